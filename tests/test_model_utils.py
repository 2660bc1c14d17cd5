"""A pruned model stays an ordinary model, and its masks hold whatever trains it."""

import copy
import gc
import io
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pruneutils as pu
from pruneutils import _torch
from pruneutils._masks.mask import MASKS


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, groups=2),
            nn.Flatten(),
            nn.Linear(64, 5),
        )


def batch(n=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(5, (n,), generator=generator)


def step(model, optimizer, data):
    optimizer.zero_grad()
    F.cross_entropy(model(data[0]), data[1]).backward()
    optimizer.step()


@torch.no_grad()
def assert_held(model, masks, optimizer=None):
    """Weights are exactly zero where the masks are False, with all of their optimizer's state; the others are not."""
    for name, weight in pu.prunable_weights(model).items():
        assert not weight[~masks[name]].any(), name
        assert (weight[masks[name]] != 0).float().mean() > 0.9
        for value in optimizer.state[weight].values() if optimizer is not None else ():
            if torch.is_tensor(value) and value.shape == weight.shape:
                assert not value[~masks[name]].any(), name


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


# --- Names and numbers -----------------------------------------------------------------------------------------------


def test_prunable_weights_are_conv_and_linear_in_module_order():
    model = net()
    assert list(pu.prunable_weights(model)) == ["0.weight", "3.weight", "5.weight"]
    assert pu.prunable_weights(model)["5.weight"] is model[5].weight
    assert list(pu.prunable_weights(model, ["3"])) == ["0.weight", "5.weight"]
    assert list(pu.prunable_weights(model, "[03].weight")) == ["5.weight"]
    assert list(pu.prunable_weights(nn.Linear(2, 2))) == ["weight"]
    assert list(pu.prunable_weights(Tied())) == ["a.weight"]


def test_nothing_to_prune_and_unknown_layers_are_told():
    with pytest.raises(ValueError, match="BatchNorm2d has no convolution or linear layer"):
        pu.prunable_weights(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="exclude.*leaves nothing"):
        pu.prunable_weights(net(), ["*"])
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="'encodr'; did you mean 'encoder'"):
        pu.prunable_weights(model, ["encodr"])


def test_layers_of_size_zero_have_no_weights_to_prune():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 0), nn.Linear(0, 3), nn.Conv2d(0, 4, 3))
    assert list(pu.prunable_weights(model)) == ["0.weight"]
    for scope in ("global", "layer", "erk"):
        for granularity in ("weight", "kernel", "filter"):
            twin = copy.deepcopy(model)
            assert pu.prune(twin, "magnitude", 0.5, scope=scope, granularity=granularity).kept == 12
            assert pu.layer_table(twin).kept.tolist() == [12] and not pu.check(twin)
    for call in (pu.count, lambda model: pu.prune(model, "magnitude", 0.5)):
        with pytest.raises(ValueError, match="nothing to prune"):
            call(model[1:])


def test_a_parametrized_weight_is_an_error():
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    with pytest.raises(ValueError, match="1.weight is computed by a parametrization"):
        pu.prune(model, "magnitude", 0.5)


def test_counts_are_exact_above_2_to_the_24():
    layer = nn.utils.skip_init(nn.Linear, 4100, 4100)
    nn.init.ones_(layer.weight)
    layer.weight.data[0, :3] = 0
    total = 4100 * 4100
    assert total > 2**24
    count = pu.count(layer)
    assert (count.total, count.kept, count.pruned) == (total, total - 3, 3) and count.sparsity == 3 / total
    pu.set_masks(layer, {"weight": layer.weight != 0})
    assert pu.count(layer).kept == pu.get_masks(layer).kept == total - 3
    assert type(count.total) is type(count.kept) is int


def test_layer_table_names_shapes_and_sparsity():
    model = net()
    assert pu.get_masks(model) == {} and pu.get_masks(model).sparsity == 0.0
    pu.prune(model, "magnitude", {"3": 0.25, "5": 0.5})
    table = pu.layer_table(model)
    assert list(table.columns) == ["layer", "shape", "total", "kept", "sparsity"]
    assert table.values.tolist() == [
        ["0", (4, 1, 3, 3), 36, 36, 0.0],
        ["3", (4, 2, 3, 3), 72, 54, 0.25],
        ["5", (5, 64), 320, 160, 0.5],
    ]
    assert pu.count(model).kept == 250


def test_returned_masks_are_copies():
    model = net()
    masks = pu.prune(model, "magnitude", 0.5)
    masks["0.weight"][:] = False
    pu.get_masks(model)["5.weight"][:] = False
    assert pu.count(model).kept == 214 == pu.get_masks(model).kept


def test_set_masks_refuses_before_anything_is_changed():
    model = net()
    before = copy.deepcopy(model.state_dict())
    good = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in pu.prunable_weights(model).items()}
    for bad, message in [
        ({"6.weight": good["0.weight"]}, "no prunable weight is called '6.weight'"),
        ({"5.weight": torch.ones(5, 63)}, r"5.weight: the mask has shape \(5, 63\), the weight \(5, 64\)"),
        ({"5.weight": torch.full((5, 64), 0.5)}, "5.weight: a mask holds only 0 and 1"),
        ({"5.weight": torch.full((5, 64), float("nan"))}, "5.weight: a mask holds only 0 and 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            pu.set_masks(model, good | bad)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert pu.get_masks(model) == {}


def test_set_masks_takes_floats_and_masks_of_another_model():
    model, other = net(0), net(1)
    masks = pu.prune(other, "magnitude", 0.7)
    pu.set_masks(model, {name: mask.float() for name, mask in masks.items()})
    assert all(torch.equal(mask, masks[name]) for name, mask in pu.get_masks(model).items())
    assert_held(model, masks)


# --- Masks hold ------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw one by one": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "adam fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_hold_for_100_steps_with_state_older_than_the_pruning(name):
    model, data = net(), batch()
    optimizer = OPTIMIZERS[name](model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data[0]), data[1])
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    masks = pu.prune(model, "magnitude", 0.8)
    assert_held(model, masks, optimizer)  # at once, before any further step
    for _ in range(100 if name != "lbfgs" else 10):
        optimizer.step(closure)
        assert not any(w[~masks[n]].any() for n, w in pu.prunable_weights(model).items())
    assert_held(model, masks, optimizer)
    assert all(torch.equal(masks[n], mask) for n, mask in pu.get_masks(model).items())


def test_masks_hold_with_gradient_scaling_and_accumulation():
    model, data = net(), batch()
    masks = pu.prune(model, "magnitude", 0.8)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    for i in range(40):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(data[0]), data[1])
        scaler.scale(loss).backward()
        if i % 4 == 3:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert_held(model, masks, optimizer)


def test_two_models_in_one_process_hold_their_own_masks():
    one, two, dense, data = net(0), net(1), net(2), batch()
    optimizer = torch.optim.Adam([*one.parameters(), *dense.parameters()])
    other = torch.optim.SGD(two.parameters(), lr=0.05, momentum=0.9)
    first, second = pu.prune(one, "magnitude", 0.5), pu.prune(two, "magnitude", 0.9, scope="layer")
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(one(data[0]) + dense(data[0]), data[1]).backward()
        optimizer.step()
        step(two, other, data)
    assert_held(one, first, optimizer)
    assert_held(two, second, other)
    assert pu.count(dense).pruned == 0


def test_tied_weights_are_pruned_once_and_stay_tied():
    model = Tied()
    masks = pu.prune(model, "magnitude", 0.5)
    assert list(masks) == ["a.weight"] and pu.count(model).kept == 18 and model.a.weight is model.b.weight
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
    assert int(model.b.weight.count_nonzero()) == 18


def test_what_was_pruned_by_the_other_name_of_a_tied_weight_stays_pruned():
    model = Tied()
    pu.prune(model.b, "magnitude", 0.5)
    assert list(pu.get_masks(model)) == ["a.weight"]
    with pytest.raises(ValueError, match="18 of 36 weights are pruned already"):
        pu.prune(model, "magnitude", 0.25)


def test_make_permanent_leaves_zeros_that_training_fills():
    model, data = net(), batch()
    pu.prune(model, "magnitude", 0.8)
    assert pu.make_permanent(model) is model
    assert pu.get_masks(model) == {} and pu.count(model).kept == 86
    assert model.__dict__.keys() == net().__dict__.keys() and model[0].__dict__.keys() == net()[0].__dict__.keys()
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), data)
    assert pu.count(model).kept > 300


def test_restore_brings_back_the_weights_from_before():
    model, data = net(), batch()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="no weights to restore"):
        pu.restore(model)
    pu.prune(model, "magnitude", 0.5, restorable=True)
    pu.prune(model, "magnitude", 0.8, restorable=True)
    clone = copy.deepcopy(model)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), data)
    for each in (model, clone):
        assert pu.restore(each) is each and pu.get_masks(each) == {}
        assert all(torch.equal(w, before[name]) for name, w in pu.prunable_weights(each).items())


# --- An ordinary model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after_backward", [False, True])
def test_a_deep_copy_holds_masks_of_its_own(after_backward):
    model, data = net(), batch()
    masks = pu.prune(model, "magnitude", 0.5)
    if after_backward:
        F.cross_entropy(model(data[0]), data[1]).backward()
    clone = copy.deepcopy(model)
    deeper = pu.prune(clone, "magnitude", 0.9, scope="layer")
    for each, mask in ((model, masks), (clone, deeper)):
        optimizer = OPTIMIZERS["adam"](each.parameters())
        step(each, optimizer, data)
        each.load_state_dict(net(3).state_dict())
        assert_held(each, mask, optimizer)
    del model
    gc.collect()
    step(clone, torch.optim.SGD(clone.parameters(), lr=1), data)
    assert_held(clone, deeper)


def test_a_pickled_model_comes_back_with_masks_that_hold():
    model, data, file = net(), batch(), io.BytesIO()
    masks = pu.prune(model, "magnitude", 0.5, restorable=True)
    torch.save(model, file)
    file.seek(0)
    back = torch.load(file, weights_only=False)
    assert all(torch.equal(masks[name], mask) for name, mask in pu.get_masks(back).items())
    step(back, torch.optim.Adam(back.parameters()), data)
    back.load_state_dict(net(1).state_dict())
    assert_held(back, masks)
    pu.restore(back)


def test_state_dict_is_that_of_an_unpruned_twin():
    model, twin = net(0), net(1)
    names = list(twin.state_dict())
    pu.prune(model, "magnitude", 0.5)
    assert list(model.state_dict()) == names and type(model[0].weight) is nn.Parameter
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in twin.named_parameters()]
    twin.load_state_dict(model.state_dict())
    model.eval(), twin.eval()
    assert torch.equal(model(batch()[0]), twin(batch()[0])) and pu.get_masks(twin) == {}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("partial", [False, True])
def test_masks_stay_when_weights_are_loaded(assign, partial):
    model, data = net(), batch()
    masks = pu.prune(model, "magnitude", 0.7)
    state = net(5).state_dict()
    if partial:
        state = {name: value for name, value in state.items() if name.startswith("5")}
    model.load_state_dict(state, strict=not partial, assign=assign)
    assert_held(model, masks)
    assert torch.equal(model[5].weight, net(5)[5].weight * masks["5.weight"])
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer, data)
    assert_held(model, masks, optimizer)
    assert list(pu.get_masks(model)) == list(masks)


@pytest.mark.parametrize("change", [dict(dtype=torch.float64), dict(memory_format=torch.channels_last)])
def test_masks_follow_dtype_and_memory_format(change):
    model, (inputs, targets) = net(), batch()
    masks = pu.prune(model, "magnitude", 0.7)
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer, (inputs, targets))
    model.to(**change)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(3):
        step(model, optimizer, (inputs.to(model[0].weight.dtype), targets))
    assert_held(model, masks, optimizer)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_masks_follow_the_model_to_the_gpu():
    model = net()
    pu.prune(model, "magnitude", 0.5)
    model.cuda()
    assert all(mask.is_cuda for mask in pu.get_masks(model).values())
    assert pu.prune(model, "magnitude", 0.9).kept == 43


def test_frozen_weights_are_pruned_and_stay_frozen():
    model = net().requires_grad_(False)
    masks = pu.prune(model, "snip", 0.5, data=batch())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert_held(model, masks)


def test_pruning_works_without_gradients_enabled():
    for mode in (torch.no_grad, torch.inference_mode):
        model = net()
        with mode():
            pu.prune(model, "magnitude", 0.5)
        step(model, torch.optim.Adam(model.parameters()), batch())
        assert_held(model, pu.get_masks(model))


def test_torch_compile_runs_and_trains_a_pruned_model():
    model, data = net(), batch()
    masks = pu.prune(model, "magnitude", 0.8, scope="layer")
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(data[0]), model(data[0]))
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        step(compiled, optimizer, data)
    assert_held(model, masks, optimizer)
    deeper = pu.prune(model, "magnitude", 0.9, scope="layer")
    torch.testing.assert_close(compiled.eval()(data[0]), model.eval()(data[0]))
    assert_held(model, deeper)


def test_torch_export_gives_the_same_outputs():
    model, (inputs, _) = net().eval(), batch()
    pu.prune(model, "magnitude", 0.8)
    exported = torch.export.export(model, (inputs,))
    torch.testing.assert_close(exported.module()(inputs), model(inputs))


def test_onnx_export_gives_the_same_outputs_and_zeros(tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, (inputs, _) = net().eval(), batch()
    masks = pu.prune(model, "magnitude", 0.8)
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (inputs,), path, dynamo=True, verbose=False, optimize=False, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(outputs), model(inputs).detach(), rtol=1e-4, atol=1e-5)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    assert int((stored["5.weight"] != 0).sum()) == int(masks["5.weight"].sum())


def test_models_that_are_dropped_leave_nothing_behind():
    gc.collect()
    before, alive = len(MASKS), []
    for seed in range(5):
        model = net(seed)
        optimizer = torch.optim.Adam(model.parameters())
        step(model, optimizer, batch())
        pu.prune(model, "magnitude", 0.5, restorable=True)
        step(model, optimizer, batch())
        alive += [weakref.ref(model), weakref.ref(model[0].weight), weakref.ref(optimizer)]
        del model, optimizer
    gc.collect()
    assert [ref for ref in alive if ref() is not None] == []
    assert len(MASKS) == before


# --- Accuracy --------------------------------------------------------------------------------------------------------


class Logits(nn.Module):
    """Returns its inputs, and remembers in which mode it was."""

    def __init__(self):
        super().__init__()
        self.norm, self.modes = nn.BatchNorm1d(3), []

    def forward(self, x):
        self.modes.append((self.training, torch.is_grad_enabled()))
        self.norm(x)
        return x


LOGITS = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
TARGETS = torch.tensor([0, 1, 2, 2])


def test_accuracy_counts_the_top_k_over_all_batches():
    model, pieces = Logits(), [(LOGITS[:3], TARGETS[:3]), (LOGITS[3:], TARGETS[3:])]
    for data in ((LOGITS, TARGETS), [LOGITS, TARGETS], pieces, iter(pieces)):
        assert pu.accuracy(model, data) == 0.5
    assert [pu.accuracy(model, pieces, topk=k) for k in (1, 2, 3)] == [0.5, 0.75, 1.0]


def test_accuracy_runs_in_eval_mode_and_puts_every_mode_back():
    model = Logits().train()
    model.norm.eval()
    stats = copy.deepcopy(model.norm.state_dict())
    pu.accuracy(model, (LOGITS, TARGETS))
    assert model.modes == [(False, False)] and model.training and not model.norm.training
    model.norm.train()
    with pytest.raises(ValueError, match="topk=4 .*3 outputs"):
        pu.accuracy(model, (LOGITS, TARGETS), topk=4)
    assert model.training and model.norm.training
    assert all(torch.equal(stats[name], value) for name, value in model.norm.state_dict().items())


class Rounding(nn.Module):
    """The second output is larger by less than bfloat16 can tell: the first of equal outputs wins there."""

    def forward(self, x):
        return x @ torch.tensor([[1.0, 1.0 + 2**-10], [0.0, 0.0]])


@pytest.mark.parametrize("pays", [False, True])
def test_accuracy_computes_in_the_precision_asked_for(monkeypatch, pays):
    monkeypatch.setattr(_torch, "bfloat16_pays", lambda device_type: pays)
    data, dense = (torch.eye(2)[:1], torch.tensor([1])), Rounding()
    assert pu.accuracy(dense, data) == pu.accuracy(dense, data, precision="auto") == 1
    assert pu.accuracy(dense, data, precision="bfloat16") == 0
    convolutional = Rounding()
    convolutional.unused = nn.Conv2d(1, 1, 1)
    assert pu.accuracy(convolutional, data) == 1
    assert pu.accuracy(convolutional, data, precision="auto") == (0 if pays else 1)
    with pytest.raises(ValueError, match="precision 'bfloat'; did you mean 'bfloat16'"):
        pu.accuracy(dense, data, precision="bfloat")


def test_accuracy_of_no_sample_is_an_error():
    for data in ([], (LOGITS[:0], TARGETS[:0])):
        with pytest.raises(ValueError, match="empty"):
            pu.accuracy(Logits(), data)
