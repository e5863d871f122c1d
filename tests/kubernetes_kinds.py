"""The fields of Kubernetes' own objects that our manifests may use: one that is not here is a typing error, or new.

Source, by which to extend them: Kubernetes' API reference (v1, policy/v1, networking.k8s.io/v1).
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"
NAME = r"^[a-z0-9][a-z0-9.-]{0,62}$"
FORMS = {
    QUANTITY: "a number, and where it has a unit one of m, k, M, G, T, Ki, Mi, Gi, Ti, without a space: 500m, 512Mi",
    NAME: "at most 63 small letters, digits, - and ., of which the first is a letter or digit",
}
"""Patterns in words."""

Labels = dict[str, str]
Quantity = Annotated[str, Field(pattern=QUANTITY)]
Quantities = dict[str, Quantity]
Port = Annotated[int, Field(ge=1, le=65535)]
PortName = Annotated[str, Field(pattern=r"^[a-z0-9-]{1,15}$")]
Name = Annotated[str, Field(pattern=NAME)]


class Kind(BaseModel):
    """No other field, and no text where a number belongs."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Kind):
    name: Name
    namespace: Name | None = None
    labels: Labels = {}
    annotations: Labels = {}


class Expression(Kind):
    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: list[str] = []


class Selector(Kind):
    matchLabels: Labels = {}
    matchExpressions: list[Expression] = []


# Pods.


class Reference(Kind):
    name: Name
    optional: bool = False


class KeyReference(Reference):
    key: str


class FieldReference(Kind):
    fieldPath: str


class ValueSource(Kind):
    secretKeyRef: KeyReference | None = None
    configMapKeyRef: KeyReference | None = None
    fieldRef: FieldReference | None = None


class Variable(Kind):
    name: str
    value: str | None = None
    valueFrom: ValueSource | None = None


class VariableSource(Kind):
    configMapRef: Reference | None = None
    secretRef: Reference | None = None


class ContainerPort(Kind):
    name: PortName
    containerPort: Port
    protocol: Literal["TCP", "UDP"] = "TCP"


class Resources(Kind):
    requests: Quantities = {}
    limits: Quantities = {}


class Capabilities(Kind):
    add: list[str] = []
    drop: list[str] = []


class ContainerSecurity(Kind):
    allowPrivilegeEscalation: bool | None = None
    capabilities: Capabilities | None = None
    privileged: bool | None = None
    readOnlyRootFilesystem: bool | None = None
    runAsNonRoot: bool | None = None
    runAsUser: int | None = None


class HttpGet(Kind):
    path: str
    port: Port | PortName


class Probe(Kind):
    httpGet: HttpGet
    initialDelaySeconds: int | None = None
    periodSeconds: int | None = None
    timeoutSeconds: int | None = None
    failureThreshold: int | None = None


class Mount(Kind):
    name: Name
    mountPath: str
    readOnly: bool = False
    subPath: str | None = None


class Container(Kind):
    name: Name
    image: str
    imagePullPolicy: Literal["Always", "IfNotPresent", "Never"] | None = None
    command: list[str] = []
    args: list[str] = []
    ports: list[ContainerPort] = []
    env: list[Variable] = []
    envFrom: list[VariableSource] = []
    resources: Resources | None = None
    securityContext: ContainerSecurity | None = None
    livenessProbe: Probe | None = None
    readinessProbe: Probe | None = None
    volumeMounts: list[Mount] = []


class ClaimVolume(Kind):
    claimName: Name


class SecretVolume(Kind):
    secretName: Name
    defaultMode: int | None = None
    optional: bool = False


class ConfigMapVolume(Reference):
    defaultMode: int | None = None


class EmptyVolume(Kind):
    medium: Literal["Memory"] | None = None
    sizeLimit: Quantity | None = None


class HostVolume(Kind):
    path: str
    type: str | None = None


class ClaimTemplate(Kind):
    spec: "ClaimSpec"


class EphemeralVolume(Kind):
    volumeClaimTemplate: ClaimTemplate


class Volume(Kind):
    name: Name
    ephemeral: EphemeralVolume | None = None
    persistentVolumeClaim: ClaimVolume | None = None
    secret: SecretVolume | None = None
    configMap: ConfigMapVolume | None = None
    emptyDir: EmptyVolume | None = None
    hostPath: HostVolume | None = None


class SeccompProfile(Kind):
    type: Literal["RuntimeDefault", "Unconfined"]


class PodSecurity(Kind):
    runAsNonRoot: bool | None = None
    runAsUser: int | None = None
    runAsGroup: int | None = None
    fsGroup: int | None = None
    fsGroupChangePolicy: Literal["OnRootMismatch", "Always"] | None = None
    seccompProfile: SeccompProfile | None = None


class Toleration(Kind):
    key: str
    operator: Literal["Exists", "Equal"]
    value: str | None = None
    effect: Literal["NoSchedule", "NoExecute", "PreferNoSchedule"] | None = None


class PodSpec(Kind):
    containers: list[Container]
    initContainers: list[Container] = []
    volumes: list[Volume] = []
    securityContext: PodSecurity | None = None
    automountServiceAccountToken: bool | None = None
    serviceAccountName: str | None = None
    nodeSelector: Labels = {}
    tolerations: list[Toleration] = []
    restartPolicy: Literal["Always", "OnFailure", "Never"] | None = None
    terminationGracePeriodSeconds: int | None = None
    hostNetwork: bool | None = None
    hostPID: bool | None = None
    hostIPC: bool | None = None


class TemplateMetadata(Kind):
    labels: Labels = {}
    annotations: Labels = {}


class PodTemplate(Kind):
    metadata: TemplateMetadata = TemplateMetadata()
    spec: PodSpec


class Pod(Kind):
    apiVersion: Literal["v1"]
    kind: Literal["Pod"]
    metadata: Metadata
    spec: PodSpec


# Other objects of Kubernetes' own.


class Namespace(Kind):
    apiVersion: Literal["v1"]
    kind: Literal["Namespace"]
    metadata: Metadata


class ConfigMap(Kind):
    apiVersion: Literal["v1"]
    kind: Literal["ConfigMap"]
    metadata: Metadata
    data: dict[str, str]


class ClaimSpec(Kind):
    accessModes: list[Literal["ReadWriteOnce", "ReadWriteMany"]]
    resources: Resources
    storageClassName: str | None = None


class PersistentVolumeClaim(Kind):
    apiVersion: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]
    metadata: Metadata
    spec: ClaimSpec


class PolicyPort(Kind):
    protocol: Literal["TCP", "UDP"]
    port: Port


class Peer(Kind):
    podSelector: Selector | None = None
    namespaceSelector: Selector | None = None


class IngressRule(Kind):
    from_: list[Peer] = Field(default=[], alias="from")
    ports: list[PolicyPort] = []


class EgressRule(Kind):
    to: list[Peer] = []
    ports: list[PolicyPort] = []


class NetworkPolicySpec(Kind):
    podSelector: Selector
    policyTypes: list[Literal["Ingress", "Egress"]]
    ingress: list[IngressRule] = []
    egress: list[EgressRule] = []


class NetworkPolicy(Kind):
    apiVersion: Literal["networking.k8s.io/v1"]
    kind: Literal["NetworkPolicy"]
    metadata: Metadata
    spec: NetworkPolicySpec


class DisruptionBudgetSpec(Kind):
    selector: Selector
    minAvailable: int | str | None = None
    maxUnavailable: int | str | None = None
    unhealthyPodEvictionPolicy: Literal["AlwaysAllow", "IfHealthyBudget"] | None = None


class PodDisruptionBudget(Kind):
    apiVersion: Literal["policy/v1"]
    kind: Literal["PodDisruptionBudget"]
    metadata: Metadata
    spec: DisruptionBudgetSpec


class ServicePort(Kind):
    number: Port


class BackendService(Kind):
    name: Name
    port: ServicePort


class Backend(Kind):
    service: BackendService


class HttpPath(Kind):
    path: str
    pathType: Literal["Prefix", "Exact"]
    backend: Backend


class HttpPaths(Kind):
    paths: list[HttpPath]


class HostRule(Kind):
    host: str
    http: HttpPaths


class HostTls(Kind):
    hosts: list[str]
    secretName: Name


class IngressSpec(Kind):
    ingressClassName: str
    tls: list[HostTls] = []
    rules: list[HostRule]


class Ingress(Kind):
    apiVersion: Literal["networking.k8s.io/v1"]
    kind: Literal["Ingress"]
    metadata: Metadata
    spec: IngressSpec
