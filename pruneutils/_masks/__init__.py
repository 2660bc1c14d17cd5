"""Masks that hold: one per parameter, for as long as the parameter lives.

What is true of every mask, whatever a program does with its models (tests/test_masks_in_any_order.py tries):

1. *One parameter, one mask.* The mask belongs to the parameter object, not to a name, a module or an `id`. All layers,
   models and optimizers that share the parameter share its mask.
2. *Lifetime.* The mask stays while the parameter lives, until every module that holds it has been made permanent. The
   death of one of several models that share the parameter changes nothing.
3. *Exact zeros.* Pruned weights are +0.0 (never -0.0, never NaN) after every call that sets masks, after every step of
   a torch optimizer and after `load_state_dict`, whatever the gradient was. So is what the optimizer keeps about them.
4. *Gradients of a pruned model.* After every backward pass, `.grad` is zero at pruned weights, so that closures, line
   searches and gradient clipping see the pruned model. `dense_gradients` switches this off.
5. *Copies.* `copy.deepcopy` and pickle give the copied parameter a copy of the mask. After that the two are strangers.
6. *Nobody else.* Only the parameters that a call names are written to, whatever models and optimizers are alive.
7. *Replaced parameters.* If a module gets another parameter of the same shape, the mask is given to it at the next call
   of this package. If the shape differs, that call raises a ValueError and changes nothing.
8. *An ordinary model.* Class, parameters and `state_dict` keys are those of the unpruned model. When the masks are
   gone, nothing is left behind.

A parameter finds its mask in `mask.MASKS`, which does not keep the parameter alive. Modules hold claims on masks
(`claims`); to copy a module is to copy its claims, and with them the masks. Three hooks keep the zeros: after a
gradient has been accumulated (`mask`), after every optimizer step (`optimizers`), and after `load_state_dict`
(`claims`).
"""

from .claims import attach, claimed_elsewhere, let_go, replaced, settle
from .mask import Mask, gradients_masked, mask_of, set_dense_gradients

__all__ = [
    "Mask",
    "attach",
    "claimed_elsewhere",
    "gradients_masked",
    "let_go",
    "mask_of",
    "replaced",
    "set_dense_gradients",
    "settle",
]
