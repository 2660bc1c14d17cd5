"""The importance of filters followed while a network trains."""

import weakref
from collections import deque

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .._checks import fraction, whole
from .importances import _bias, averaged, biased, filter_weights


class track_importance:
    """Follow `biased_loss` of all filters while a model trains: a context manager, and a measure for `prune_filters`.

    After every optimizer step it takes |w g| with the gradient of that step, weighs it, and sums it over each filter;
    the score is a moving average over the last batches (Lubana and Dick 2021, "biased_loss_tracked"). Filters removed
    in between start it anew.

    Args:
        model: The model that is trained.
        alpha: The share of the newest batch in the average, in [0, 1].
        track_batches: How many batches the average goes back.
        use_l2: Whether to weigh by |w|; else by the distance from `params_init`.
        params_init: A model or state_dict from before training, for `use_l2=False`.

    Raises:
        ValueError: For an `alpha` outside [0, 1], fewer than one batch, or `use_l2=False` without `params_init`.

    Example:
        >>> model = pu.models.create("lenet5")
        >>> train, test = pu.data.load("digits")
        >>> with pu.track_importance(model, track_batches=5) as tracked:
        ...     history = pu.fit(model, train.subset(256), epochs=1, lr=0.01)
        >>> pu.prune_filters(model, tracked, ratio=0.5, example_inputs=train.batch(1)[0]).conv2.weight.shape[0] < 50
        True
    """

    def __init__(
        self,
        model: nn.Module,
        alpha: float = 0.8,
        track_batches: int = 20,
        use_l2: bool = True,
        params_init: object = None,
    ):
        self.alpha = fraction("alpha", alpha)
        self._model, self._options = weakref.ref(model), (use_l2, params_init)
        self._history: deque = deque(maxlen=whole("track_batches", track_batches))
        _bias(model, *self._options)

    def __enter__(self) -> "track_importance":
        self._hook = register_optimizer_step_post_hook(self._after_step)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()

    def _after_step(self, optimizer, *_) -> None:
        model = self._model()
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        if model is None or not any(id(p) in stepped for p in model.parameters()):
            return
        weights = filter_weights(model)
        gradients = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in weights.items()}
        with torch.no_grad():
            scores = biased(model, weights, gradients, _bias(model, *self._options))
        if self._history and any(self._history[-1][name].shape != score.shape for name, score in scores.items()):
            self._history.clear()
        self._history.append(scores)

    def __call__(self, model: nn.Module, data: object = None) -> dict[str, torch.Tensor]:
        """Return {weight name: one score a filter}."""
        return averaged(list(self._history), self.alpha)
