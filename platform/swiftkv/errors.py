"""Every error a user can cause, as one tree. Does not log, print or decide exit codes (that is `cli`).

    SwiftKVError
    ├── ConfigError (ValueError)            a setting, recipe or command line that cannot work
    ├── CheckpointError (ValueError)        a model folder that is missing, foreign or unsafe
    ├── ShapeError (ValueError)             tensors that do not fit together
    ├── DataError (ValueError)              training or evaluation text that cannot be used
    ├── RegistryError (RuntimeError)        the registry refused
    │   ├── VersionExistsError              a version is written once and never changed
    │   ├── VersionNotFoundError            no such model, version or alias
    │   ├── IntegrityError                  bytes differ from the manifest
    │   └── StoreError                      its store cannot be reached, or refuses
    ├── TrainingError (RuntimeError)         a distillation run could not go on; its checkpoints are kept
    │   └── DivergedError                   its loss can no longer be trusted
    ├── ClusterError (RuntimeError)         a Ray cluster did not start, or a job on it failed
    └── EngineError (RuntimeError)          vLLM did not start, or was asked for what it cannot serve

A message says what was given, what is allowed and what to change. Errors cross Ray processes, so none has
an `__init__` of its own and all of them pickle.
"""


class SwiftKVError(Exception):
    """Base of all errors that a user can cause."""


class ConfigError(SwiftKVError, ValueError):
    """A setting, recipe or command line that cannot work."""


class CheckpointError(SwiftKVError, ValueError):
    """A model folder that is missing, of another kind, incomplete or unsafe to load."""


class ShapeError(SwiftKVError, ValueError):
    """Tensors whose shapes do not fit together."""


class DataError(SwiftKVError, ValueError):
    """Training or evaluation text that is missing, empty or malformed."""


class RegistryError(SwiftKVError, RuntimeError):
    """The registry refused an operation."""


class VersionExistsError(RegistryError):
    """A version of that name is already published; versions never change."""


class VersionNotFoundError(RegistryError):
    """No such model, version or alias in the registry."""


class IntegrityError(RegistryError):
    """The bytes of a version differ from its manifest."""


class StoreError(RegistryError):
    """The registry's store cannot be reached from here, or refuses."""


class TrainingError(SwiftKVError, RuntimeError):
    """A distillation run could not go on; its checkpoints are kept."""


class DivergedError(TrainingError):
    """The loss of a run can no longer be trusted."""


class ClusterError(SwiftKVError, RuntimeError):
    """A Ray cluster did not start, or a job on it failed."""


class EngineError(SwiftKVError, RuntimeError):
    """vLLM did not start, or was asked for something it cannot serve."""
