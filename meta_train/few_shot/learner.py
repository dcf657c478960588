"""One module with as many sets of parameters as there are episodes, all adapted in one pass."""

import copy
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from learned_optim.meta_train.few_shot.episodes import FewShotTask
from learned_optim.meta_train.inner.vectorize import VectorizedTask
from learned_optim.meta_train.tasks import Batch

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class Learner(VectorizedTask):
    """The learner of a few-shot task. Parameters are ``(B, N)``, a row for each episode.

    Args:
        task: gives module and loss.
        seed: determines :attr:`fresh_parameters`.
        device: device on which learners are adapted to episodes.

    Raises:
        ValueError: the module has batch norm with running statistics.
    """

    def __init__(self, task: FewShotTask, seed: int, *, device: torch.device | str = "cpu") -> None:
        super().__init__(task, 1, seed, device=device)
        self.few_shot = task
        self.batches: Iterator[Batch] = iter(())
        norms = [module for module in self.skeleton.modules() if isinstance(module, BATCH_NORMS)]
        if any(norm.track_running_stats for norm in norms):
            raise ValueError("batch norm of a few-shot learner needs track_running_stats=False: it keeps no statistics")
        self.couples_examples = bool(norms)
        """Whether a prediction depends on what else is predicted with it."""

    @property
    def fresh_parameters(self) -> Tensor:
        """Freshly initialised parameters, ``(N,)``."""
        return self.initial_parameters[0]

    def with_batches(self, parameters: Tensor, batches: Iterator[Batch]) -> "Learner":
        """This learner at ``parameters`` ``(B, N)``, with the next of ``batches`` for every inner step."""
        copied = copy.copy(self)
        copied.batches, copied.initial_parameters = batches, parameters
        copied.instances = copied.siblings = len(parameters)
        copied.buffers = {
            name: tensor[:1].expand(len(parameters), *tensor.shape[1:]) for name, tensor in self.buffers.items()
        }
        return copied

    def batch(self, generator: torch.Generator) -> Batch:
        """The next batch; ``generator`` has no influence."""
        return next(self.batches)

    def losses_and_grads(
        self, parameters: Tensor, batch: Batch, *, differentiable: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Losses ``(B,)`` and gradients ``(B, N)``. If not differentiable, no graph leads to ``parameters``."""
        return super().losses_and_grads(
            parameters if differentiable else parameters.detach(), batch, differentiable=differentiable
        )

    def predict(
        self, parameters: Tensor, inputs: Tensor, beside: Tensor | None = None, *, features: bool = False
    ) -> Tensor:
        """Predictions ``(B, n, outputs)`` for ``inputs`` ``(B, n, ...)``.

        Args:
            parameters: those of each learner, ``(B, N)``, or of all, ``(N,)``.
            inputs: examples.
            beside: None: batch norm takes its statistics from all of ``inputs`` together, which is *transductive*: a
                prediction knows of the other examples to be predicted. Else support inputs ``(B, m, ...)``: each
                example is normalised together with these and with nothing else (Nichol et al. 2018, section 6.1).
            features: return what the last layer sees instead, ``(B, n, features)``.
        """
        module = self._embedding if features else self.skeleton.module
        assert isinstance(module, nn.Module)  # for the type checker
        wanted = dict((*module.named_parameters(), *module.named_buffers())).keys()

        def of_one(parameters: Tensor, buffers: dict[str, Tensor], inputs: Tensor) -> Tensor:
            all_named = {
                name.removeprefix("module."): part for name, part in (self.named(parameters) | buffers).items()
            }
            named = {name: all_named[name] for name in wanted}
            predictions: Tensor = functional_call(module, named, (inputs,))
            return predictions

        dims = (None if parameters.dim() == 1 else 0, None, 0)
        buffers = {name: tensor[0] for name, tensor in self.buffers.items()}
        if beside is None or not self.couples_examples:
            return vmap(of_one, dims)(parameters, buffers, inputs)
        copies = beside[:, None].expand(-1, inputs.shape[1], *beside.shape[1:])
        together = torch.cat([copies, inputs[:, :, None]], 2)  # (B, n, m + 1, ...)
        predictions: Tensor = vmap(vmap(of_one, (None, None, 0)), dims)(parameters, buffers, together)
        return predictions[:, :, -1]

    @functools.cached_property
    def _embedding(self) -> nn.Module:
        module = self.skeleton.module
        assert isinstance(module, nn.Sequential)  # as FewShotTask.module makes it
        return module[:-1]

    def module_with(self, parameters: Tensor) -> nn.Module:
        """The learner as a module of its own with ``parameters`` ``(N,)``."""
        assert isinstance(self.skeleton.module, nn.Module)  # for the type checker
        module = copy.deepcopy(self.skeleton.module)
        with torch.no_grad():
            for name, part in self.named(parameters).items():
                module.get_parameter(name.removeprefix("module.")).copy_(part)
        return module
