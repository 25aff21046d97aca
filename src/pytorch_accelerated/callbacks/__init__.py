"""Callbacks: what can be added to a run without changing the trainer.

They hear of the events of a run, in the order in which they are listed::

    trainer = Trainer(
        model, loss_func, optimizer,
        callbacks=(*DEFAULT_CALLBACKS, SaveBestModelCallback(), PrintLearningRate),
    )
"""

from pytorch_accelerated.callbacks.base import CallbackHandler, TrainerCallback
from pytorch_accelerated.callbacks.batches import LimitBatchesCallback
from pytorch_accelerated.callbacks.best import BestSoFar
from pytorch_accelerated.callbacks.checkpointing import (
    SaveBestModelCallback,
    SaveTrainingStateCallback,
)
from pytorch_accelerated.callbacks.ema import ModelEmaCallback
from pytorch_accelerated.callbacks.evaluation import (
    LimitEvalStepsCallback,
    StepBasedEvaluationCallback,
)
from pytorch_accelerated.callbacks.history import Recorder, RecordHistoryCallback
from pytorch_accelerated.callbacks.logging import LogMetricsCallback
from pytorch_accelerated.callbacks.modules import (
    ConvertSyncBatchNormCallback,
    MoveModulesToDeviceCallback,
)
from pytorch_accelerated.callbacks.optuna import OptunaPruningCallback
from pytorch_accelerated.callbacks.preemption import PreemptionCallback
from pytorch_accelerated.callbacks.profiler import ProfilerCallback
from pytorch_accelerated.callbacks.progress import (
    PrintProgressCallback,
    ProgressBarCallback,
)
from pytorch_accelerated.callbacks.report import ReportCallback
from pytorch_accelerated.callbacks.stopping import (
    EarlyStoppingCallback,
    TerminateOnNaNCallback,
)
from pytorch_accelerated.callbacks.swa import SwaCallback
from pytorch_accelerated.callbacks.throughput import ThroughputCallback
from pytorch_accelerated.callbacks.tracker import TrackerCallback
from pytorch_accelerated.callbacks.unfreezing import UnfreezeCallback
from pytorch_accelerated.callbacks.wsd import WSDCheckpointCallback
from pytorch_accelerated.errors import (
    CallbackMethodNotImplementedError,
    StopTrainingError,
)

__all__ = [
    "BestSoFar",
    "CallbackHandler",
    "CallbackMethodNotImplementedError",
    "ConvertSyncBatchNormCallback",
    "EarlyStoppingCallback",
    "LimitBatchesCallback",
    "LimitEvalStepsCallback",
    "LogMetricsCallback",
    "ModelEmaCallback",
    "MoveModulesToDeviceCallback",
    "OptunaPruningCallback",
    "PreemptionCallback",
    "PrintProgressCallback",
    "ProfilerCallback",
    "ProgressBarCallback",
    "RecordHistoryCallback",
    "Recorder",
    "ReportCallback",
    "SaveBestModelCallback",
    "SaveTrainingStateCallback",
    "StepBasedEvaluationCallback",
    "StopTrainingError",
    "SwaCallback",
    "TerminateOnNaNCallback",
    "ThroughputCallback",
    "TrackerCallback",
    "TrainerCallback",
    "UnfreezeCallback",
    "WSDCheckpointCallback",
    "get_default_callbacks",
]


def get_default_callbacks(
    progress_bar: bool = True,
) -> tuple[type[TrainerCallback], ...]:
    """Return the callbacks that a trainer has by default.

    Args:
        progress_bar: Whether a progress bar is among them.
    """
    bar = (ProgressBarCallback,) if progress_bar else ()
    return (
        MoveModulesToDeviceCallback,
        TerminateOnNaNCallback,
        PrintProgressCallback,
        *bar,
        LogMetricsCallback,
    )
