"""Masks hold where they used to fail: one test for each way in which pruned weights came back or were miscounted."""

import copy
import gc
import importlib
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pruneutils as pu
from pruneutils import _torchvision, model_utils
from pruneutils._masks import claims, mask, mask_of, optimizers


def linear(n_in=4, n_out=4, seed=0, keep=None, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = nn.Linear(n_in, n_out, **options)
    if keep is not None:
        pu.set_masks(layer, {"weight": torch.tensor(keep)})
    return layer


def half(layer):
    """Prune half of the weights; return the mask."""
    return pu.prune(layer, "magnitude", 0.5)["weight"]


def assert_zero(weight, keep):
    pruned = weight.detach()[~keep]
    assert not pruned.any() and not torch.signbit(pruned).any()


class Coder(nn.Module):
    """A decoder tied to its embedding, as in language models."""

    def __init__(self, sparse=False):
        super().__init__()
        self.embedding, self.decoder = nn.Embedding(5, 6, sparse=sparse), nn.Linear(6, 5, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens):
        return self.decoder(self.embedding(tokens))


# --- Every optimizer -------------------------------------------------------------------------------------------------


def names_of_optimizers():
    _torchvision.load()  # timm imports it
    optim = importlib.import_module("timm.optim")
    own = [name for name, each in vars(torch.optim).items() if isinstance(each, type) and each.__module__ != "abc"]
    own = [f"torch/{name}" for name in own if issubclass(getattr(torch.optim, name), torch.optim.Optimizer)]
    others = optim.list_optimizers(exclude_filters=["fused*", "bnb*", "*8bit*", "apollo*"])
    return sorted(set(own) - {"torch/Optimizer", "torch/SparseAdam"}) + [f"timm/{name}" for name in others]


def optimizer_called(name, model):
    kind, _, name = name.partition("/")
    if kind == "timm":
        return importlib.import_module("timm.optim").create_optimizer_v2(model, opt=name, lr=1e-2, weight_decay=1e-2)
    matrices = [p for p in model.parameters() if p.ndim == 2]  # all that Muon takes
    return getattr(torch.optim, name)(matrices if name == "Muon" else model.parameters(), lr=1e-2)


@pytest.mark.parametrize("name", names_of_optimizers())
def test_masks_hold_with_every_optimizer_of_torch_and_timm(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        inputs, targets = torch.randn(16, 8), torch.randn(16, 8)
        optimizer = optimizer_called(name, model)

        def closure():
            optimizer.zero_grad()
            loss = F.mse_loss(model(inputs), targets)
            loss.backward(create_graph="hessian" in name)
            return loss

        for turn in range(6):
            if turn == 3:
                masks = pu.prune(model, "magnitude", 0.5)
            with torch.enable_grad():
                optimizer.step(closure)
    for key, weight in pu.prunable_weights(model).items():
        assert_zero(weight, masks[key])
        for value in optimizer.state[weight].values():
            if torch.is_tensor(value) and value.shape == weight.shape:
                assert not value[~masks[key]].any()
    assert pu.count(model).kept == 64 and sum(int(w.count_nonzero()) for w in pu.prunable_weights(model).values()) > 60


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), -0.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_pruned_weights_are_plus_zero_whatever_their_gradient(value, dtype):
    layer = linear().to(dtype)
    keep = half(layer)
    for make in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        optimizer = make(layer.parameters(), lr=0.5, weight_decay=3.0)
        for _ in range(3):
            layer.weight.grad = torch.where(keep, 0.1, value).to(dtype)
            optimizer.step()
            assert_zero(layer.weight, keep)
            assert layer.weight.isfinite().all() and layer.weight[keep].count_nonzero() == 8


def test_state_of_any_type_is_cleared_and_never_stops_a_step():
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            p = self.param_groups[0]["params"][0]
            types = torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bfloat16
            self.state[p] = {dtype: torch.ones_like(p, dtype=dtype) for dtype in (*types, torch.complex64)}
            self.state[p] |= {"one for all": torch.ones(()).expand(p.shape), "sparse": torch.eye(4).to_sparse()}
            self.state[p] |= {"wide": torch.ones_like(p, dtype=torch.complex128), "list": [1.0], "none": None}

    layer = linear()
    keep, optimizer = half(layer), Odd(layer.parameters(), lr=0.1)
    for _ in range(2):
        layer(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        for name, value in optimizer.state[layer.weight].items():
            if isinstance(name, torch.dtype):
                assert torch.equal(value != 0, keep), name


def test_lbfgs_finds_the_best_weights_among_those_kept():
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(60, 20, generator=generator), torch.randn(60, 1, generator=generator)
    layer = linear(20, 1, bias=False)
    optimizer = torch.optim.LBFGS(layer.parameters(), line_search_fn="strong_wolfe")
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(layer(inputs), targets)
        loss.backward()
        losses.append(loss.item())
        return loss

    optimizer.step(closure)
    keep = half(layer)[0]
    losses.clear()
    for _ in range(4):
        optimizer.step(closure)
    best = torch.linalg.lstsq(inputs[:, keep], targets).solution
    torch.testing.assert_close(layer.weight[0, keep], best[:, 0], rtol=1e-3, atol=1e-4)
    assert F.mse_loss(layer(inputs), targets).item() == pytest.approx(min(losses), rel=1e-6)


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


def test_steps_that_fail_half_way_leave_no_trace():
    layer = linear()
    keep, optimizer = half(layer), torch.optim.Adam(layer.parameters(), lr=0.1)
    for fails in (False, True, True, True, False):
        layer.weight.grad = torch.ones(4, 4)
        if fails:
            with pytest.raises(KeyError):
                optimizer.step(lambda: {}["no closure"])
        else:
            optimizer.step()
            assert_zero(layer.weight, keep)
            assert not optimizer.state[layer.weight]["exp_avg_sq"][~keep].any()
            assert optimizer.state[layer.weight]["exp_avg_sq"][keep].max() < 1


def test_an_optimizer_follows_when_its_parameters_are_exchanged():
    """The plan of the first steps must not outlive what it was made for."""
    layer = linear(keep=[[1, 1, 0, 0]] * 4)
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
    other = linear(keep=[[0, 1, 1, 1]] * 4)
    optimizer.param_groups[0]["params"][0] = other.weight
    step()
    assert not other.weight[:, 0].any()
    optimizer.load_state_dict(torch.optim.SGD(linear().parameters(), lr=0.1).state_dict())
    step()
    assert not other.weight[:, 0].any() and other.weight[:, 1:].all()
    square = layer.weight.data
    optimizer.param_groups[0]["params"][0] = layer.weight
    step()
    layer.weight.data = square.t()  # the same memory, another order
    step()
    assert torch.equal(layer.weight != 0, torch.tensor([[1, 0, 0, 1]] * 4) * (square.t() != 0) != 0)


# --- Gradients -------------------------------------------------------------------------------------------------------


def test_gradients_of_pruned_weights_are_zero_in_accumulation_too():
    layer = linear()
    keep = half(layer)
    for n in (1, 2, 3):
        layer(torch.ones(1, 4)).sum().backward()
        assert torch.equal(layer.weight.grad, n * keep.float())


def test_clipping_counts_the_pruned_model_only():
    layer = linear(bias=False)
    keep = half(layer)
    layer(torch.ones(1, 4)).sum().backward()
    assert torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0).item() == pytest.approx(8**0.5)
    torch.testing.assert_close(layer.weight.grad, keep / 8**0.5)


def test_pruning_masks_the_gradient_that_is_there():
    layer = linear()
    layer(torch.ones(1, 4)).sum().backward()
    keep = half(layer)
    assert torch.equal(layer.weight.grad, keep.float())


def test_dense_gradients_are_a_switch():
    layer = linear()

    def gradient():
        layer.zero_grad()
        layer(torch.ones(1, 4)).sum().backward()
        return layer.weight.grad

    with pu.dense_gradients(layer) as same:
        assert same is layer
        keep = half(layer)  # masks that come later are meant too
        assert gradient().all()
        with pu.dense_gradients(layer):
            pass
        assert gradient().all()
    assert torch.equal(gradient(), keep.float())
    with pytest.raises(KeyError), pu.dense_gradients(layer):
        raise KeyError
    assert torch.equal(gradient(), keep.float())


def test_frozen_weights_have_masked_gradients_when_they_thaw():
    layer = linear().requires_grad_(False)
    keep = half(layer)
    layer.requires_grad_(True)(torch.ones(1, 4)).sum().backward()
    assert torch.equal(layer.weight.grad, keep.float())
    layer.double()
    layer.zero_grad()
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


def test_a_sparse_gradient_passes():
    model = Coder(sparse=True)
    masks = pu.prune(model, "magnitude", 0.5)
    model.embedding(torch.tensor([1, 2])).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert_zero(model.embedding.weight, masks["decoder.weight"])


def test_loops_without_an_optimizer_train_the_pruned_model():
    layer, inputs = linear(), torch.ones(2, 4)
    keep = half(layer)
    for _ in range(3):
        layer.zero_grad()
        layer(inputs).square().sum().backward()
        for p in layer.parameters():
            p.data -= 0.1 * p.grad
    assert_zero(layer.weight, keep)


def test_distributed_training_averages_masked_gradients(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch without torch.distributed")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for view in (False, True):
            layer = linear()
            wrapped = nn.parallel.DistributedDataParallel(layer, gradient_as_bucket_view=view)
            keep = half(layer)
            optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
            for n in range(3):
                wrapped(torch.ones(1, 4)).sum().backward()
                assert torch.equal(layer.weight.grad, (n + 1) * keep)
                optimizer.step()
            assert_zero(layer.weight, keep)
    finally:
        torch.distributed.destroy_process_group()


# --- Nobody else -----------------------------------------------------------------------------------------------------


def test_pruning_one_model_leaves_the_graph_of_another_alone():
    one, other, inputs = linear(), linear(seed=1), torch.ones(2, 4)
    half(other)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    other(inputs).sum().backward()
    optimizer.step()
    loss = nn.Sequential(linear(), other, nn.Tanh())(inputs).sum()
    half(one)
    loss.backward()


def test_a_step_does_not_disturb_the_graph_of_weights_that_it_does_not_move():
    one, other, inputs = linear(), linear(seed=1), torch.ones(2, 4)
    half(one), half(other)
    optimizer = torch.optim.SGD([*one.parameters(), *other.parameters()], lr=0.1)
    loss = nn.Sequential(linear(), other)(inputs).sum()
    one(inputs).sum().backward()
    optimizer.step()
    loss.backward()


def test_pruning_between_forward_and_backward_is_noticed_by_autograd():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    loss = model(torch.ones(2, 4)).sum()
    pu.prune(model, "magnitude", 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_ids_that_are_used_again_find_no_mask():
    """Thousands of parameters die pruned, and as many come to life where they were."""
    gc.collect()
    before, reused, pruned = len(mask.MASKS), 0, set()
    for _ in range(3000):
        layer = nn.Linear(2, 2)
        reused += id(layer.weight) in pruned
        assert mask_of(layer.weight) is None and pu.get_masks(layer) == {}
        pruned.add(id(layer.weight))
        half(layer)
        del layer
    assert reused > 100 and len(mask.MASKS) == before


# --- Shared and replaced parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_dense_twin_revives_no_tied_weight(assign):
    model = Coder()
    masks = pu.prune(model, "magnitude", 0.5)
    model.load_state_dict(Coder().state_dict(), assign=assign)
    for layer in (model.embedding, model.decoder):
        assert_zero(layer.weight, masks["decoder.weight"])
        assert layer.weight.count_nonzero() == 15


def test_lottery_tickets_rewind_tied_weights():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, inputs):
            return self.second(torch.relu(self.first(inputs)))

    generator = torch.Generator().manual_seed(0)
    data = torch.randn(32, 8, generator=generator), torch.randint(8, (32,), generator=generator)
    table = pu.lottery_ticket(Twice(), data, sparsity=0.75, rounds=2, epochs=1, rewind_step=0)
    assert table.sparsity.tolist() == [0.0, 0.5, 0.75]


def test_a_mask_outlives_the_model_that_it_was_made_for():
    shared = linear()
    one, other = nn.Sequential(shared), nn.Sequential(linear(seed=1))
    other[0].weight = shared.weight
    keep = pu.prune(one, "magnitude", 0.5)["0.weight"]
    del one, shared
    gc.collect()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert_zero(other[0].weight, keep)
    assert torch.equal(pu.get_masks(other)["0.weight"], keep)
    assert torch.equal(pu.get_masks(copy.deepcopy(other))["0.weight"], keep)


def test_a_shared_mask_goes_when_the_last_model_lets_go():
    one, other = linear(), linear(seed=1)
    other.weight = one.weight
    half(one), half(other)
    with pytest.warns(UserWarning, match="weight: shared with a pruned model outside of this one"):
        pu.make_permanent(one)
    assert pu.count(one).kept == 8 and len(pu.get_masks(one)) == 1
    pu.make_permanent(nn.ModuleList([one, other]))
    assert pu.get_masks(one) == {} == pu.get_masks(other)
    assert one.__dict__.keys() == nn.Linear(1, 1).__dict__.keys()


def test_a_parameter_of_the_same_shape_takes_the_mask_over():
    layer = linear()
    keep = half(layer)
    old, layer.weight = weakref.ref(layer.weight), nn.Parameter(torch.ones(4, 4))
    assert old() is None  # nothing of ours keeps it alive
    assert pu.count(layer).kept == 8
    assert torch.equal(layer.weight, keep.float())
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert_zero(layer.weight, keep)


def test_a_parameter_that_takes_a_mask_over_loses_its_momentum_there():
    layer, dense = linear(), linear(seed=1)
    keep, optimizer = half(layer), torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9)
    dense(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    layer.weight = dense.weight
    pu.get_masks(layer)
    assert torch.equal(optimizer.state[dense.weight]["momentum_buffer"] != 0, keep)
    assert torch.equal(dense.weight.grad != 0, keep)


def test_a_parameter_of_another_shape_is_an_error_that_says_what_to_do():
    model = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3))
    pu.prune(model, "magnitude", 0.5, scope="layer")
    model[0].weight = nn.Parameter(torch.ones(1, 8))  # would broadcast against the mask
    before = copy.deepcopy(model.state_dict())
    for call in (pu.count, pu.get_masks, pu.layer_table, pu.hold, lambda m: pu.prune(m, "magnitude", 0.9)):
        with pytest.raises(ValueError, match=r"0.weight was replaced .* \(1, 8\), .* mask has shape \(5, 8\).*set_"):
            call(model)
    model.load_state_dict(before)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    fixed = copy.deepcopy(model)
    pu.set_masks(fixed, {"0.weight": torch.tensor([[1, 0] * 4])})
    assert pu.count(fixed).kept == 4 + 7
    assert pu.get_masks(pu.make_permanent(model)) == {} and model[0].weight.all()


def test_masks_survive_a_visit_to_the_meta_device():
    layer = linear()
    keep = half(layer)
    layer.to("meta")
    assert torch.equal(pu.get_masks(layer)["weight"], keep)
    layer.to_empty(device="cpu").load_state_dict(linear(seed=3).state_dict())
    assert torch.equal(layer.weight, linear(seed=3).weight * keep)
    assert pu.count(layer).kept == 8


def test_masks_survive_a_reload():
    layer = linear()
    keep = half(layer)
    hooks = importlib.import_module("torch.optim.optimizer")._global_optimizer_post_hooks
    n_hooks = len(hooks)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    modules = [mask, optimizers, claims, model_utils]
    saved = [dict(vars(module)) for module in modules]
    try:
        for module in modules:
            importlib.reload(module)
        layer(torch.ones(1, 4)).sum().backward()
        assert torch.equal(layer.weight.grad, keep.float())
        optimizer.step()
        assert_zero(layer.weight, keep)
        assert torch.equal(model_utils.get_masks(layer)["weight"], keep)
        model_utils.set_masks(layer, {"weight": ~keep})
        layer.load_state_dict(linear(seed=2).state_dict())
        assert_zero(layer.weight, ~keep)
        assert len(hooks) == n_hooks
    finally:  # other tests compare classes
        for module, content in zip(modules, saved):
            handles = vars(module).get("_HANDLES")
            vars(module).update(content)
            if handles is not None:
                module._HANDLES = handles


def test_shallow_copies_share_masks():
    layer = linear()
    keep = half(layer)
    other = copy.copy(layer)
    assert torch.equal(pu.get_masks(other)["weight"], keep)
    pu.make_permanent(other)
    assert pu.get_masks(layer) == {} == pu.get_masks(other)


# --- What is told ----------------------------------------------------------------------------------------------------


def test_counts_tell_of_revived_weights_and_hold_zeroes_them():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    masks = pu.prune(model, "magnitude", 0.5, scope="layer")
    assert model_utils.revived(model) == {}
    model[1].reset_parameters()
    assert model_utils.revived(model) == {"1.weight": 8}
    with pytest.warns(pu.RevivedWeightsWarning, match=r"8 pruned weights are not zero \(1: 8\).*pu.hold") as told:
        assert pu.count(model).kept == 24
    assert told[0].filename == __file__
    with pytest.warns(pu.RevivedWeightsWarning):
        assert pu.layer_table(model).kept.tolist() == [8, 16]
    assert pu.hold(model) is model and pu.count(model).kept == 16
    for name, weight in pu.prunable_weights(model).items():
        assert_zero(weight, masks[name])
    assert pu.hold(linear()).weight.all()  # no masks, nothing to do


def test_restore_keeps_the_masks_of_layers_that_it_does_not_restore():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = copy.deepcopy(model.state_dict())
    pu.prune(model, "magnitude", {"0": 0.5})
    pu.prune(model, "magnitude", {"1": 0.5}, restorable=True)
    pu.restore(model)
    assert list(pu.get_masks(model)) == ["0.weight"] and pu.count(model).kept == 8 + 16
    assert torch.equal(model[1].weight, before["1.weight"])
    model.load_state_dict(before)
    assert pu.count(model).kept == 8 + 16
    with pytest.raises(ValueError, match="no weights to restore"):
        pu.restore(model)


def test_restore_does_not_take_weights_away_from_another_pruned_model():
    one, other = linear(), linear()
    other.weight = one.weight
    pu.prune(one, "magnitude", 0.5, restorable=True)
    pu.prune(other, "magnitude", 0.75)
    with pytest.raises(ValueError, match="weight: shared with a pruned model outside"):
        pu.restore(one)
    assert pu.count(one).kept == pu.count(other).kept == 4
