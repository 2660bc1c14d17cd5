"""Masks hold where they used to fail: one test for each way in which pruned weights came back or were miscounted."""

import copy
import importlib
import io
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import tensor
from torch.nn.utils import parametrizations

import pruneutils as pu
from pruneutils import _torchvision


def linear(n_in=4, n_out=4, seed=0, keep=None, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = nn.Linear(n_in, n_out, **options)
    if keep is not None:
        pu.set_masks(layer, {"weight": torch.tensor(keep)})
    return layer


def half(layer):
    """Prune half of the weights; return the mask."""
    return next(iter(pu.prune(layer, "magnitude", 0.5).values()))


def assert_zero(weight, keep):
    pruned = weight.detach()[~keep]
    assert not pruned.any() and not torch.signbit(pruned).any()


# --- Every optimizer -------------------------------------------------------------------------------------------------


VARIANTS = {  # of torch's optimizers, beside its defaults
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "AdamW one by one": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "RMSprop centered": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "LBFGS wolfe": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2, line_search_fn="strong_wolfe"),
}


def names_of_optimizers():
    _torchvision.load()  # timm imports it
    optim = importlib.import_module("timm.optim")
    own = [name for name, each in vars(torch.optim).items() if isinstance(each, type) and each.__module__ != "abc"]
    own = {name for name in own if issubclass(getattr(torch.optim, name), torch.optim.Optimizer)}
    own = [f"torch/{name}" for name in sorted(own - {"Optimizer", "SparseAdam"})]
    others = optim.list_optimizers(exclude_filters=["fused*", "bnb*", "*8bit*", "apollo*"])
    return [*VARIANTS, *own, *(f"timm/{name}" for name in others)]


def optimizer_called(name, model):
    kind, _, own = name.partition("/")
    if kind == "timm":
        return importlib.import_module("timm.optim").create_optimizer_v2(model, opt=own, lr=1e-2, weight_decay=1e-2)
    if name in VARIANTS:
        return VARIANTS[name](model.parameters())
    matrices = [p for p in model.parameters() if p.ndim == 2]  # all that Muon takes
    return getattr(torch.optim, own)(matrices if own == "Muon" else model.parameters(), lr=1e-2)


@pytest.mark.parametrize("name", names_of_optimizers())
def test_masks_hold_with_every_optimizer_of_torch_and_timm(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pu.prune(nn.Linear(2, 2), "magnitude", 0.5)  # the first mask of the process
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        inputs, targets = torch.randn(16, 8), torch.randn(16, 8)
        optimizer = optimizer_called(name, model)

        def closure():
            optimizer.zero_grad()
            loss = F.mse_loss(model(inputs), targets)
            loss.backward(create_graph="hessian" in name)
            return loss

        for turn in range(8):
            if turn == 3:  # weights and state are cleared at once, before any further step
                masks = pu.prune(model, "magnitude", 0.5)
            else:
                with torch.enable_grad():
                    optimizer.step(closure)
            for key, weight in pu.prunable_weights(model).items() if turn >= 3 else ():
                assert_zero(weight, masks[key])
                for value in optimizer.state[weight].values():
                    if torch.is_tensor(value) and value.shape == weight.shape:
                        assert not value[~masks[key]].any()
    assert pu.count(model).kept == 64 and sum(int(w.count_nonzero()) for w in pu.prunable_weights(model).values()) > 60


def test_the_same_optimizer_goes_on_as_an_ordinary_one():
    """Adam's second moments are tiny where weights are pruned, while a step runs: kept weights must not feel it."""
    for make in (torch.optim.Adam, torch.optim.AdamW):
        layer, plain = linear(), linear()
        keep = half(layer)
        with torch.no_grad():
            plain.weight.mul_(keep)
        ours, theirs = make(layer.parameters(), lr=0.1, amsgrad=True), make(plain.parameters(), lr=0.1, amsgrad=True)
        for i in range(8):
            for each, optimizer in ((layer, ours), (plain, theirs)):
                optimizer.zero_grad()
                each(torch.full((1, 4), i + 1.0)).square().sum().backward()
                each.weight.grad.mul_(keep)
                optimizer.step()
        assert torch.equal(layer.weight, plain.weight)
        saved = pickle.loads(pickle.dumps(ours.state_dict()))
        assert all(torch.equal(a, b) for a, b in zip(saved["state"][0].values(), theirs.state[plain.weight].values()))
        assert "_pruneutils_plan" not in copy.deepcopy(ours).__dict__


def test_an_optimizer_follows_when_its_parameters_are_exchanged():
    """The plan of the first steps must not outlive what it was made for."""
    layer, other = linear(keep=[[1, 1, 0, 0]] * 4), linear(keep=[[0, 1, 1, 1]] * 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)

    def step():
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()

    step()
    layer.weight.data = layer.weight.data.clone()  # other memory
    step()
    assert pu.count(layer).kept == 8 and not layer.weight[:, 2:].any()
    pu.set_masks(layer, {"weight": torch.tensor([[1, 0, 0, 1]] * 4)})
    step()
    assert layer.weight[:, 3].all() and not layer.weight[:, 1:3].any()
    square = layer.weight.data
    layer.weight.data = square.t()  # the same memory, another order
    step()
    assert torch.equal(layer.weight != 0, torch.tensor([[1, 0, 0, 1]] * 4) * (square.t() != 0) != 0)
    optimizer.param_groups[0]["params"][0] = other.weight
    step()
    optimizer.load_state_dict(torch.optim.SGD(linear().parameters(), lr=0.1).state_dict())
    step()
    assert not other.weight[:, 0].any() and other.weight[:, 1:].all()


class Momentum(torch.optim.SGD):
    """Notes what it keeps about the first parameter when a step begins."""

    def step(self, closure=None):
        self.seen = [value.clone() for value in self.state[self.param_groups[0]["params"][0]].values()]
        return super().step(closure)


@pytest.mark.parametrize("kept_again", [False, True])
def test_a_copied_or_loaded_optimizer_begins_its_first_step_with_cleared_state(kept_again):
    layer = linear()
    old = Momentum(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 4)).sum().backward()
    old.step()
    fresh = Momentum(layer.parameters(), lr=0.1, momentum=0.9)
    fresh.load_state_dict(copy.deepcopy(old.state_dict()))
    twin, copied = copy.deepcopy((layer, old))
    for each, optimizer in ((layer, fresh), (twin, copied)):
        keep = half(each)
        if kept_again:  # momentum from before the pruning must not move these weights
            pu.set_masks(each, {"weight": torch.ones(4, 4)})
        optimizer.step()
        (momentum,) = optimizer.seen
        assert not momentum[~keep].any() and momentum[keep].all()
        assert_zero(each.weight, keep)


def test_the_first_mask_of_a_process_brings_the_hooks_and_finds_older_optimizers():
    script = """
        import torch
        import pruneutils as pu
        from torch.optim import optimizer as hooks

        layer = torch.nn.Linear(4, 4)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
        for _ in range(3):
            layer(torch.ones(1, 4)).sum().backward()
            optimizer.step()
        assert not hooks._global_optimizer_post_hooks
        keep = pu.prune(layer, "magnitude", 0.5)["weight"]
        assert hooks._global_optimizer_post_hooks
        layer(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        for value in (layer.weight, *optimizer.state[layer.weight].values()):
            assert value.shape != keep.shape or torch.equal(value != 0, keep)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


def test_masks_of_a_loaded_model_can_be_taken_out_and_written_to():
    """torch._lazy_clone of storage that torch.load has read crashes the process."""
    file, layer = io.BytesIO(), linear(keep=[[1, 1, 0, 0]] * 4)
    torch.save(layer, file)
    file.seek(0)
    back = torch.load(file, weights_only=False)
    masks = pu.get_masks(back)
    masks["weight"][:] = False
    pu.hold(back).load_state_dict(linear(seed=3).state_dict())
    assert pu.prune(back, "magnitude", 0.75).kept == 4 == pu.count(back).kept and not masks["weight"].any()


# --- Gradients -------------------------------------------------------------------------------------------------------


def test_gradients_of_pruned_weights_are_zero_in_accumulation_too():
    layer = linear(bias=False)
    layer(torch.ones(1, 4)).sum().backward()
    keep = half(layer)  # what is there is masked at once
    for n in (1, 2, 3):
        assert torch.equal(layer.weight.grad, n * keep.float())
        layer(torch.ones(1, 4)).sum().backward()
    assert torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0).item() == pytest.approx(4 * 8**0.5)
    torch.testing.assert_close(layer.weight.grad, keep / 8**0.5)


def test_dense_gradients_are_a_switch():
    layer, dense = linear(), pu.model_utils.dense_gradients

    def gradient():
        layer.zero_grad()
        layer(torch.ones(1, 4)).sum().backward()
        return layer.weight.grad

    with dense(layer):
        keep = half(layer)  # masks that come later are meant too
        assert gradient().all()
        with dense(layer):
            pass
        assert gradient().all()
    with pytest.raises(KeyError), dense(layer):
        raise KeyError
    assert torch.equal(gradient(), keep.float())


def test_frozen_weights_stay_frozen_and_have_masked_gradients_when_they_thaw():
    layer = linear().requires_grad_(False)
    keep = half(layer)
    assert not layer.weight.requires_grad
    layer.requires_grad_(True).double()
    layer(torch.ones(1, 4, dtype=torch.double)).sum().backward()
    assert torch.equal(layer.weight.grad, keep.double())


@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_that_have_gradients_are_masked_as_part_of_the_graph():
    layer = linear(1, 2, bias=False, keep=[[1], [0]])
    layer(torch.ones(1, 1)).square().sum().backward(create_graph=True)
    gradient = layer.weight.grad
    assert gradient[1] == 0 and gradient.requires_grad
    (second,) = torch.autograd.grad(gradient.square().sum(), layer.weight)  # of (2w)^2
    torch.testing.assert_close(second, 8 * layer.weight)
    layer.weight.grad = None


@pytest.fixture
def one_process(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch without torch.distributed")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("view", [False, True])
def test_distributed_training_averages_masked_gradients(one_process, view):
    layer = linear()
    wrapped = nn.parallel.DistributedDataParallel(layer, gradient_as_bucket_view=view)
    keep = half(layer)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    for n in range(3):
        wrapped(torch.ones(1, 4)).sum().backward()
        assert torch.equal(layer.weight.grad, (n + 1) * keep)
        optimizer.step()
    assert_zero(layer.weight, keep)


# --- Parameters that a mask does not fit -----------------------------------------------------------------------------


def flatten(layer):
    """As sharding does: the weight becomes a view of a parameter that lies elsewhere."""
    view = layer.weight.detach()
    del layer.weight
    layer.weight = view


def put(convert):
    """Replace the weight by another parameter of the same shape."""
    return lambda layer: setattr(layer, "weight", nn.Parameter(convert(layer.weight.detach()), requires_grad=False))


def shard(weight):
    return tensor.distribute_tensor(weight, torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))


MISFITS = {
    "weight_norm": (parametrizations.weight_norm, "no parameter: a parametrization, flattening or del"),
    "old weight_norm": (nn.utils.weight_norm, "no parameter"),
    "flattened": (flatten, "no parameter"),
    "data": (lambda layer: setattr(layer.weight, "data", torch.ones(2, 4)), r"shape \(2, 4\), and .* shape \(4, 4\)"),
    "set_": (lambda layer: torch.no_grad()(layer.weight.set_)(), r"shape \(0,\), and .*; set another by pu.set_masks"),
}
UNMASKABLE = {
    "meta": (lambda layer: layer.to("meta"), "is on the meta device, without values; load the whole model first"),
    "sparse": (put(torch.Tensor.to_sparse_csr), "is stored as torch.sparse_csr; convert it by .to_dense"),
    "sharded": (put(shard), "is a DTensor; prune the model before it is sharded"),
    "quantized": (put(torch.Tensor.char), "holds torch.int8; prune the model before it is quantized"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*MISFITS, *UNMASKABLE])
def test_what_a_mask_does_not_fit_is_named(kind, tmp_path, one_process):
    model = nn.Sequential(linear(), linear())
    pu.prune(model, "magnitude", 0.5, scope="layer")
    change, message = (MISFITS | UNMASKABLE)[kind]
    change(model[0])
    for call in (pu.count, pu.get_masks, pu.hold, lambda m: pu.prune(m, sparsity=0.9), lambda m: pu.save(m, tmp_path)):
        with pytest.raises(ValueError, match=f"^0.weight has .*{message}.*, or give up the mask by pu.make_permanent"):
            call(model)
    (found,) = [each for each in pu.check(model) if each.check == "lost_masks"]
    assert (found.severity, found.where) == ("error", "0.weight") and "pu.make_permanent" in found.call
    pu.set_masks(model, {"1.weight": torch.eye(4)})  # the others go on
    assert pu.get_masks(pu.make_permanent(model)) == {}
    calls = [lambda: pu.set_masks(model, {"0.weight": torch.eye(4)}), lambda: pu.prune(model, sparsity=0.9)]
    calls += [lambda: pu.count(model)] if kind != "sparse" else []
    for call in calls if kind in UNMASKABLE else ():
        with pytest.raises(ValueError, match=f"^0.weight {message}"):
            call()


def test_masks_are_refused_where_torch_swaps_parameters():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with pytest.raises(ValueError, match=r"^weight: masks need .*set_swap_module_params_on_conversion\(False\)"):
            half(linear())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_sparse_weights_are_counted_when_the_masks_are_gone():
    layer = linear(keep=[[1, 1, 0, 0]] * 4)
    put(torch.Tensor.to_sparse_csr)(pu.make_permanent(layer))
    assert pu.count(layer).kept == 8 and pu.layer_table(layer).sparsity.item() == 0.5


def test_pruning_between_forward_and_backward_is_noticed_by_autograd():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    loss = model(torch.ones(2, 4)).sum()
    pu.prune(model, "magnitude", 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- Revived and restored weights ------------------------------------------------------------------------------------


def test_counts_warn_of_revived_weights_and_hold_zeroes_them():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    masks = pu.prune(model, "magnitude", 0.5, scope="layer")
    model[1].reset_parameters()
    with pytest.warns(pu.model_utils.RevivedWeightsWarning, match="1: 8") as warned:
        assert pu.count(model).kept == 24
    assert warned[0].filename == __file__
    assert pu.hold(model) is model and pu.count(model).kept == 16
    for name, weight in pu.prunable_weights(model).items():
        assert_zero(weight, masks[name])
    assert pu.hold(linear()).weight.all()  # no masks, nothing to do


def test_restore_touches_only_what_was_pruned_restorably_and_is_not_shared():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = copy.deepcopy(model.state_dict())
    pu.prune(model, "magnitude", {"0": 0.5})
    pu.prune(model, "magnitude", {"1": 0.5}, restorable=True)
    other = linear()
    other.weight = model[1].weight
    pu.prune(other, "magnitude", 0.75)
    with pytest.warns(UserWarning, match="1.weight: shared with a pruned model outside"):
        pu.restore(model)
    assert pu.count(model).kept == 8 + 4
    with pytest.warns(UserWarning, match="weight: shared"):
        pu.make_permanent(other)
    pu.restore(model)
    assert list(pu.get_masks(model)) == ["0.weight"] and torch.equal(model[1].weight, before["1.weight"])
