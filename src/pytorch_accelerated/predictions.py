"""What a model makes of data, one batch after the other."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pytorch_accelerated import checks, distributed
from pytorch_accelerated.run import Aside, Run, UnderWay

if TYPE_CHECKING:
    from pytorch_accelerated.trainer import Trainer


def iterate(trainer: Trainer, run: Run) -> Generator[Any, None, None]:
    """Yield the predictions for each batch of all processes, on the CPU. Collective.

    Args:
        trainer: The trainer.
        run: With the data as its ``eval_dataset``. It is under way until the generator
            ends or is closed.

    Raises:
        ValueError: If there is nothing to predict.
        RuntimeError: If another generator was started amid this one.
    """
    checks.check_can_evaluate(run)  # here too, since a generator has not started yet
    return _iterate(trainer, run)


@torch.no_grad()  # while it runs, and not while the caller has a batch
def _iterate(trainer: Trainer, run: Run) -> Generator[Any, None, None]:
    with UnderWay(trainer, run):
        trainer._prepare(run)
        with Aside(trainer):
            trainer.model.eval()
            for batch in run.eval_dataloader:
                gathered = trainer.gather(trainer.calculate_predictions(batch))
                yield distributed.map_tensors(Tensor.cpu, gathered)
                if trainer._run is not run:
                    raise RuntimeError(
                        "Predictions were asked for while others are iterated over. "
                        "Go through them one after the other."
                    )


def concatenate(batches: Iterable[Any]) -> Any:
    """Return the predictions for all samples, in one structure of tensors."""
    return distributed.map_tensors(lambda *tensors: torch.cat(tensors), *batches)
