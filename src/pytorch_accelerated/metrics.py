"""Metrics of a whole epoch, exact on any number of processes.

A metric is one of torchmetrics, which synchronises its state itself, or a function of
all predictions and targets, which are gathered from all processes for it.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object, recursively_apply, send_to_device
from torch import Tensor

from pytorch_accelerated import distributed, step_output
from pytorch_accelerated.diagnosis import is_out_of_memory
from pytorch_accelerated.errors import warn
from pytorch_accelerated.step_output import NumItems

# The state of what functions are given, among those of metrics: no name of a metric.
_INPUTS = "model_outputs"


def check_metrics(
    metrics: Any, train_metrics: Any = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metrics of evaluations and those of training, by their names.

    Args:
        metrics: What the trainer was given.
        train_metrics: Likewise; True for the same ones.

    Raises:
        TypeError: If something in them is no metric.
        ValueError: If a name cannot be that of a metric.
    """
    if train_metrics is True and not metrics:
        raise ValueError("train_metrics=True needs metrics, which are to be the same.")
    if isinstance(train_metrics, bool):
        train_metrics = metrics if train_metrics else None
    return _checked("metrics", metrics), _checked("train_metrics", train_metrics)


def _checked(argument: str, metrics: Any) -> dict[str, Any]:
    if _has_state(metrics) and hasattr(metrics, "values"):
        return {"": metrics}  # a collection, whose metrics have names
    if not isinstance(metrics, Mapping | None):
        raise TypeError(
            f"{argument} must be a dictionary of names and metrics, such as "
            '{"accuracy": MulticlassAccuracy(10)}, or a MetricCollection; got a '
            f"{type(metrics).__name__}."
        )
    for name, metric in (metrics or {}).items():
        if not isinstance(name, str) or not name or name in step_output.RESERVED:
            raise ValueError(
                f"{argument} has a metric named {name!r}. Its name must be a text, and "
                f"none of {', '.join(sorted(step_output.RESERVED))}."
            )
        if isinstance(metric, type) or not callable(metric):
            raise TypeError(
                f"{argument}[{name!r}] must be a function of all predictions and "
                "targets, or an instance of a metric or a collection of torchmetrics "
                f"(pip install 'pytorch-accelerated[metrics]'); got {metric!r}."
            )
    return dict(metrics or {})


def _has_state(metric: Any) -> bool:
    """Say whether this is of torchmetrics."""
    library = sys.modules.get("torchmetrics")  # there, if anything is of it
    return library is not None and isinstance(
        metric, (library.Metric, library.MetricCollection)
    )


def default_metric_inputs(
    batch: Any, batch_output: Mapping[str, Any]
) -> tuple[Any, Any]:
    """Return the predictions and the targets of a batch.

    Raises:
        ValueError: If there are none where they are looked for.
    """
    predictions, targets = batch_output.get("model_outputs"), None
    if isinstance(predictions, Mapping):  # those of transformers are some too
        predictions = predictions.get("logits")
    if isinstance(batch, Mapping):
        targets = batch.get("labels")
    elif isinstance(batch, (list, tuple)) and len(batch) > 1:
        targets = batch[1]
    if predictions is None or targets is None:
        raise ValueError(
            "Metrics need predictions and targets: by default the 'model_outputs' that "
            "a step returns (of a mapping its 'logits'), and the second member of a "
            f"batch or its 'labels'. Got {step_output.describe_batch(batch)}, and the "
            f"step returned {list(batch_output)}. Override calculate_metric_inputs("
            "batch, batch_output) to return what belongs to this batch."
        )
    return predictions, targets


def start_metrics(
    metrics: Mapping[str, Any], device: torch.device
) -> EpochMetrics | None:
    """Return what calculates the metrics of a pass over the data, if there are any."""
    return EpochMetrics(metrics, device) if metrics else None


class EpochMetrics:
    """The metrics of one pass over the data, with states of their own.

    Args:
        metrics: The metrics, which are left as they are.
        device: Where the batches are.

    Attributes:
        names: Those in collections; of the other metrics they are known at the end.
    """

    def __init__(self, metrics: Mapping[str, Any], device: torch.device) -> None:
        self._device = device
        self.names: set[str] = {
            _join(name, key)
            for name, metric in metrics.items()
            if hasattr(metric, "keys")
            for key in metric.keys()  # noqa: SIM118
        }
        self._functions = {k: v for k, v in metrics.items() if not _has_state(v)}
        # What they are given: for each batch the predictions and the targets.
        self._inputs: list[Any] = []
        self._metrics = {
            name: metric.clone().to(device)
            for name, metric in metrics.items()
            if _has_state(metric)
        }
        for metric in self._metrics.values():
            metric.reset()
            for part in filter(_has_state, metric.modules()):
                part.persistent(True)

    def update(self, num_items: NumItems, inputs: Any) -> None:
        """Add a batch, without waiting for the device.

        Args:
            num_items: Items of the batch; 0 if it only keeps other processes company.
            inputs: What metrics are given of it: the predictions and the targets.

        Raises:
            ValueError: If a metric does not take the inputs; it names the metric.
        """
        if not isinstance(num_items, Tensor) and num_items == 0:
            return
        inputs = recursively_apply(Tensor.detach, tuple(inputs))
        for name, metric in self._metrics.items():
            with _named(name, inputs), torch.no_grad():
                metric.update(*inputs)
        if self._functions:
            with _named(" and ".join(self._functions), inputs):
                self._inputs.append(distributed.map_tensors(_detached, inputs))

    def compute(self) -> dict[str, Any]:
        """Return the metrics of all batches on all processes, on the CPU. Collective.

        What is a dictionary gives a metric for each of its members.

        Raises:
            ValueError: If a metric cannot be computed; it names the metric.
        """
        values: dict[str, Any] = {}
        for name, metric in self._metrics.items():
            with _named(name, ()), warnings.catch_warnings():
                # A process may have had its batches before the run was resumed.
                warnings.filterwarnings("ignore", "The ``compute`` method of metric")
                values[name] = recursively_apply(Tensor.cpu, metric.compute())
        inputs: Any = self._inputs_of_all() if self._functions else None
        for name, function in self._functions.items() if inputs else ():
            with _named(name, inputs), torch.no_grad():
                given = inputs
                if len(self._functions) > 1:  # which may change what it is given
                    given = distributed.map_tensors(Tensor.clone, inputs)
                values[name] = function(*given)
                if values[name] is None:
                    raise TypeError("It returned nothing.")
        return {
            _join(name, key): member
            for name, value in values.items()
            for key, member in (
                value if isinstance(value, Mapping) else {"": value}
            ).items()
        }

    def _inputs_of_all(self) -> Any:
        """Return the inputs of all batches on all processes. Collective."""
        if distributed.agree(not self._inputs):
            self._take_part()
        if not self._inputs:
            return None
        with _named(" and ".join(self._functions), self._inputs[0]):
            inputs = distributed.gather_uneven(self._own_inputs())
        self._inputs = []
        return distributed.map_tensors(Tensor.cpu, inputs)

    def _take_part(self) -> None:
        """Let a process without batches have what others have, of no samples."""
        # Tensors on no device are pickled: any kind, in structures of any class.
        found = gather_object(
            [
                distributed.map_tensors(lambda each: each[:0].to("meta"), inputs)
                for inputs in self._inputs[:1]
            ]
        )
        if found and not self._inputs:
            create = partial(torch.empty_like, device=self._device)
            self._inputs = [distributed.map_tensors(create, found[0])]

    def _own_inputs(self) -> Any:
        return distributed.map_tensors(lambda *each: torch.cat(each), *self._inputs)

    def __deepcopy__(self, memo: Any) -> EpochMetrics:
        twin = copy.copy(self)
        twin._metrics = copy.deepcopy(self._metrics, memo)
        twin._inputs = list(self._inputs)  # what is in it never changes
        return twin

    def state_dict(self) -> dict[str, Any]:
        """Return the states on this process, as tensors and lists of them."""
        states = {name: each.state_dict() for name, each in self._metrics.items()}
        return {**states, _INPUTS: self._own_inputs() if self._inputs else None}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Go on from the states that :meth:`state_dict` returned."""
        lacks_inputs = self._functions and states.get(_INPUTS) is None
        if lacks_inputs or states.keys() != {*self._metrics, _INPUTS}:
            warn(
                "The training metrics of this epoch count only what comes from here: "
                "it was saved with other metrics, or by another number of processes."
            )
            return
        for name, metric in self._metrics.items():
            metric.load_state_dict(states[name])
            metric.to(self._device)
        if self._functions:
            self._inputs = [send_to_device(states[_INPUTS], self._device)]


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(tensor.shape or (1,))


def _join(name: str, key: Any) -> str:
    """Return the name of a member of what a metric returns."""
    return "_".join(filter(None, (name, str(key))))


@contextmanager
def _named(name: str, inputs: Any) -> Iterator[None]:
    """Let an error of a metric say which it was, and what it was given."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        given = ", ".join(map(step_output.describe_batch, inputs)) or "all batches"
        raise ValueError(
            f"The metric {name!r} failed on {given}. Override calculate_metric_inputs "
            f"if it needs something else. {type(error).__name__}: {error}"
        ) from error
