"""The fields of KubeRay's and the Prometheus operator's objects that our manifests may use, and what is wrong with one.

Sources, by which to extend them: KubeRay 1.7's field reference of ray.io/v1 (docs/reference/api.md of that release),
whose upper levels are here whole, with `Any` for what no manifest of ours uses; the Prometheus operator's API reference
of monitoring.coreos.com/v1.
"""

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from kubernetes_kinds import (
    FORMS,
    ConfigMap,
    ContainerSecurity,
    Ingress,
    Kind,
    Labels,
    Metadata,
    Mount,
    Name,
    Namespace,
    NetworkPolicy,
    PersistentVolumeClaim,
    Pod,
    PodDisruptionBudget,
    PodTemplate,
    PortName,
    Resources,
    Selector,
    ValueSource,
    Variable,
    VariableSource,
)
from pydantic import BaseModel, Field, ValidationError

from swiftkv.config import describe_fault

RAY_NAME = r"^[a-z]([a-z0-9-]{0,45}[a-z0-9])?$"
RayName = Annotated[str, Field(pattern=RAY_NAME)]
"""KubeRay makes names of Services of them."""
FORMS = {**FORMS, RAY_NAME: "at most 47 small letters, digits and -, of which the first is a letter and the last no -"}
Duration = Annotated[str, Field(pattern=r"^[0-9]+[smh]$")]


class RayMetadata(Metadata):
    name: RayName


class AuthOptions(Kind):
    mode: Literal["token", "disabled"]
    secretName: Name | None = None
    enableK8sTokenAuth: Any = None


class RedisCredential(Kind):
    value: str | None = None
    valueFrom: ValueSource | None = None


class GcsFaultToleranceOptions(Kind):
    backend: Literal["redis"] | None = None
    redisAddress: str
    redisUsername: RedisCredential | None = None
    redisPassword: RedisCredential | None = None
    externalStorageNamespace: str | None = None
    storage: Any = None


class AutoscalerOptions(Kind):
    version: Literal["v1", "v2"] | None = None
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    idleTimeoutSeconds: int | None = None
    image: str | None = None
    imagePullPolicy: Literal["Always", "IfNotPresent", "Never"] | None = None
    resources: Resources | None = None
    securityContext: ContainerSecurity | None = None
    env: list[Variable] = Field(default=[])
    envFrom: list[VariableSource] = Field(default=[])
    volumeMounts: list[Mount] = Field(default=[])
    command: Any = None
    args: Any = None


class HeadGroup(Kind):
    rayStartParams: Labels = Field(default={})
    template: PodTemplate
    labels: Labels = Field(default={})
    resources: Labels = Field(default={})
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] | None = None
    headService: Any = None
    enableIngress: Any = None
    ingressOptions: Any = None


class WorkerGroup(Kind):
    groupName: Name
    minReplicas: int
    maxReplicas: int
    replicas: int | None = None
    idleTimeoutSeconds: int | None = None
    numOfHosts: int = 1
    priority: int | None = None
    rayStartParams: Labels = Field(default={})
    template: PodTemplate
    labels: Labels = Field(default={})
    resources: Labels = Field(default={})
    suspend: Any = None
    scaleStrategy: Any = None


class RayClusterSpec(Kind):
    rayVersion: str
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = Field(default=[])
    authOptions: AuthOptions | None = None
    enableInTreeAutoscaling: bool = False
    autoscalerOptions: AutoscalerOptions | None = None
    gcsFaultToleranceOptions: GcsFaultToleranceOptions | None = None
    upgradeStrategy: Any = None
    suspend: Any = None
    managedBy: Any = None
    headServiceAnnotations: Labels = Field(default={})
    historyServerOptions: Any = None
    networkPolicy: Any = None
    tlsOptions: Any = None


class RayCluster(Kind):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: RayMetadata
    spec: RayClusterSpec


class RayServiceUpgrade(Kind):
    type: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]
    clusterUpgradeOptions: Any = None


class RayServiceSpec(Kind):
    serveConfigV2: str
    rayClusterConfig: RayClusterSpec
    upgradeStrategy: RayServiceUpgrade | None = None
    rayClusterDeletionDelaySeconds: int | None = None
    excludeHeadPodFromServeSvc: bool = False
    serveService: Any = None
    suspend: Any = None
    managedBy: Any = None
    serviceUnhealthySecondThreshold: Any = None
    deploymentUnhealthySecondThreshold: Any = None


class RayService(Kind):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: RayMetadata
    spec: RayServiceSpec


class RayJobSpec(Kind):
    entrypoint: str
    rayClusterSpec: RayClusterSpec | None = None
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] | None = None
    entrypointNumCpus: float | None = None
    entrypointNumGpus: float | None = None
    entrypointResources: str | None = None
    backoffLimit: int | None = None
    shutdownAfterJobFinishes: bool | None = None
    ttlSecondsAfterFinished: int | None = None
    activeDeadlineSeconds: int | None = None
    preRunningDeadlineSeconds: int | None = None
    runtimeEnvYAML: str | None = None
    metadata: Labels = Field(default={})
    clusterSelector: Labels = Field(default={})
    jobId: str | None = None
    submitterPodTemplate: PodTemplate | None = None
    submitterConfig: Any = None
    deletionStrategy: Any = None
    suspend: Any = None
    managedBy: Any = None


class RayJob(Kind):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: RayMetadata
    spec: RayJobSpec


# The Prometheus operator's.


class MetricsEndpoint(Kind):
    port: PortName
    interval: Duration | None = None
    path: str | None = None


class PodMonitorSpec(Kind):
    selector: Selector
    podMetricsEndpoints: list[MetricsEndpoint]


class PodMonitor(Kind):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PodMonitor"]
    metadata: Metadata
    spec: PodMonitorSpec


class Rule(Kind):
    expr: str
    record: str | None = None
    alert: str | None = None
    for_: Duration | None = Field(default=None, alias="for")
    labels: Labels = Field(default={})
    annotations: Labels = Field(default={})


class RuleGroup(Kind):
    name: str
    interval: Duration | None = None
    rules: list[Rule]


class PrometheusRuleSpec(Kind):
    groups: list[RuleGroup]


class PrometheusRule(Kind):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PrometheusRule"]
    metadata: Metadata
    spec: PrometheusRuleSpec


KINDS: dict[str, type[Kind]] = {
    each.__name__: each
    for each in (
        *(Namespace, ConfigMap, PersistentVolumeClaim, Pod, NetworkPolicy, PodDisruptionBudget, Ingress),
        *(RayCluster, RayService, RayJob, PodMonitor, PrometheusRule),
    )
}
"""By what manifests say in `kind`."""


def find_wrong_fields(found: dict[str, Any]) -> Iterator[str]:
    """What is wrong with an object's fields, each with its place and the nearest field that there is."""
    kind = KINDS.get(found.get("kind", ""))
    if kind is None:
        nearest = difflib.get_close_matches(str(found.get("kind")), KINDS, n=1, cutoff=0.0)[0]
        name = found.get("metadata", {}).get("name")
        yield f"{found.get('kind')} {name}: no such kind among ours; nearest: {nearest}."
        return
    try:
        kind.model_validate(found)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            yield f"{kind.__name__} {found.get('metadata', {}).get('name')}: {_describe(problem, kind)}"


def _describe(problem: Any, kind: type[BaseModel]) -> str:
    *parents, last = problem["loc"]
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        allowed = _list_fields(kind, parents)
        nearest = difflib.get_close_matches(str(last), allowed, n=1, cutoff=0.0)
        return f"{place}: no such field; nearest: {', '.join(nearest)}. Fields there: {', '.join(allowed)}."
    if problem["type"] == "missing":
        return f"{place}: missing; add it."
    form = FORMS.get(problem.get("ctx", {}).get("pattern"))
    return f"{place}: {f'should be {form}' if form else describe_fault(problem)} (given: {problem['input']!r})."


def _list_fields(kind: Any, location: Sequence[int | str]) -> list[str]:
    """The fields of the class at a place within `kind`."""
    for part in location:
        kinds = [each for each in _unpack(kind) if isinstance(each, type) and issubclass(each, BaseModel)]
        if isinstance(part, int) or not kinds:
            continue
        fields = {field.alias or name: field.annotation for each in kinds for name, field in each.model_fields.items()}
        kind = fields.get(part, kind)
    found = next((each for each in _unpack(kind) if isinstance(each, type) and issubclass(each, BaseModel)), None)
    return sorted(field.alias or name for name, field in found.model_fields.items()) if found else []


def _unpack(annotation: Any) -> list[Any]:
    """The classes in `list[A]`, `A | None` and the like."""
    if typing.get_origin(annotation) in (list, dict, types.UnionType, typing.Union):
        return [each for inner in typing.get_args(annotation) for each in _unpack(inner)]
    return [annotation]
