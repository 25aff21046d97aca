"""Learning-rate schedules that know the length of the run.

They need torch alone, and can be used in a training loop of one's own as well.
"""

from pytorch_accelerated.schedulers.cosine_scheduler import CosineLrScheduler
from pytorch_accelerated.schedulers.curve import plot_schedule, schedule_curve
from pytorch_accelerated.schedulers.progress_scheduler import ProgressLrScheduler
from pytorch_accelerated.schedulers.scheduler_base import (
    InvalidScheduleError,
    SchedulerBase,
    StatefulSchedulerBase,
)
from pytorch_accelerated.schedulers.wsd_scheduler import WSDLrScheduler

__all__ = [
    "CosineLrScheduler",
    "InvalidScheduleError",
    "ProgressLrScheduler",
    "SchedulerBase",
    "StatefulSchedulerBase",
    "WSDLrScheduler",
    "plot_schedule",
    "schedule_curve",
]
