"""Wrong calls raise before anything changes; the error names the argument or layer, and the value given."""

import copy
import operator
import types

import numpy as np
import pytest
import torch
from torch import nn

import pruneutils as pu

NAN = float("nan")

# function, arguments by name ("$batch" is what `given` calls so), error, what its text names
WRONG = [
    # --- Layers ------------------------------------------------------------------------------------------------------
    ("prune", dict(sparsity=0.5, exclude=["fc"]), ValueError, ["exclude", "'fc'", "fc1"]),
    ("prune", dict(sparsity=0.5, exclude=["$fc1"]), TypeError, ["exclude", "Linear"]),
    ("prune", dict(sparsity=0.5, exclude="*"), ValueError, ["exclude", "'*'"]),
    ("prune", dict(sparsity={"fc9": 0.5}), ValueError, ["'fc9'", "fc3"]),
    ("set_masks", dict(masks={"fc1": torch.ones(300, 784)}), ValueError, ["'fc1'", "fc1.weight"]),
    ("set_masks", dict(masks={"fc3.weight": "all"}), TypeError, ["fc3.weight", "'all'"]),
    ("set_masks", dict(masks={"fc3.weight": torch.ones(3, 1)}), ValueError, ["fc3.weight", "(3, 1)", "(10, 100)"]),
    ("set_masks", dict(masks="$model"), TypeError, ["masks", "Sequential", "get_masks"]),
    # --- How much ----------------------------------------------------------------------------------------------------
    ("prune", dict(sparsity=True), ValueError, ["sparsity", "True"]),
    ("prune", dict(sparsity=torch.tensor([0.9, 0.5])), ValueError, ["sparsity", "tensor"]),
    ("prune", dict(), ValueError, ["sparsity"]),
    ("prune", dict(criterion=0.9), ValueError, ["criterion", "0.9"]),
    ("prune", dict(granularity="5:4"), ValueError, ["5:4"]),
    ("prune", dict(sparsity=0.9, iterations=0), ValueError, ["iterations", "0"]),
    ("prune_threshold", dict(threshold="magnitude"), ValueError, ["threshold", "'magnitude'"]),
    ("gradual", dict(train="$batch", sparsities=0.9), ValueError, ["sparsities", "0.9"]),
    ("lottery_ticket", dict(train="$batch", sparsity=0.9, rounds=0), ValueError, ["rounds", "0"]),
    # --- Names -------------------------------------------------------------------------------------------------------
    ("prune", dict(criterion="SNIP", sparsity=0.9, data="$batch"), ValueError, ["'SNIP'", "'snip'"]),
    ("prune", dict(sparsity=0.5, scope="layerwise"), ValueError, ["scope", "'layerwise'", "'layer'"]),
    ("prune", dict(sparsity=0.9, iterations=2, schedule="exp"), ValueError, ["schedule", "'exp'", "exponential"]),
    ("fit", dict(train="$batch", epochs=1, optimizer="SGD"), ValueError, ["optimizer", "'SGD'", "'sgd'"]),
    ("gradual", dict(train="$batch", lrr=0.1), TypeError, ["'lrr'", "lr"]),
    # --- Data --------------------------------------------------------------------------------------------------------
    ("prune", dict(criterion="snip", sparsity=0.9, data="digits"), TypeError, ["data", "'digits'", "pu.data.load"]),
    ("prune", dict(criterion="snip", sparsity=0.9, data="$two"), TypeError, ["batch", "Images"]),
    ("accuracy", dict(data="$arrays"), TypeError, ["ndarray"]),
    ("accuracy", dict(data="$inputs"), TypeError, ["pair", "'labels'", "(8, 1, 28, 28) float32 without targets"]),
    ("accuracy", dict(data={"ids": [[1, 2]]}), TypeError, ["return_tensors='pt'"]),
    ("scores", dict(criterion="wanda", data=[{"ids": [[1, 2]]}]), TypeError, ["return_tensors='pt'"]),
    ("accuracy", dict(data="$batch", precision="half"), ValueError, ["precision", "'half'"]),
    ("fit", dict(train="digits", epochs=1), TypeError, ["train", "'digits'"]),
    ("fit", dict(train="$batch", test=5), TypeError, ["test", "5"]),
    ("fit", dict(train="$short", epochs=1), ValueError, ["8", "3"]),
    ("fit", dict(train="$beyond", epochs=1), ValueError, ["10 outputs"]),
    # --- Training ----------------------------------------------------------------------------------------------------
    ("fit", dict(train="$batch", epochs=1.5), ValueError, ["epochs", "1.5"]),
    ("fit", dict(train="$batch", epochs=1, seed=-1), ValueError, ["seed", "-1"]),
    ("fit", dict(train="$batch", epochs=1, loss_fn="mse"), TypeError, ["loss_fn", "'mse'"]),
    ("fit", dict(train="$batch", epochs=1, optimizer="$stranger"), ValueError, ["SGD", "Sequential"]),
    ("prune", dict(criterion="random", sparsity=0.9, seed="a"), ValueError, ["seed", "'a'"]),
]
NOT_A_MODEL = ["$state", "$masks", "$images", "resnet20", nn.Linear, None, [nn.Parameter(torch.ones(1))]]
TAKES_A_MODEL = [
    ("prune", dict(sparsity=0.5)),
    ("prune_threshold", dict(threshold=0.1)),
    ("prune_filters", dict(criterion="l1", ratio=0.5, example_inputs="$inputs")),
    ("scores", dict(criterion="magnitude")),
    ("accuracy", dict(data="$batch")),
    ("fit", dict(train="$batch", epochs=1)),
    ("lottery_ticket", dict(train="$batch", sparsity=0.5)),
    ("recalibrate", dict(data="$batch")),
    ("save", dict(path="none.safetensors")),
    ("set_masks", dict(masks={})),
    *[(name, {}) for name in ("count", "layer_table", "get_masks", "hold", "restore", "make_permanent")],
]
ELSEWHERE = [  # functions that take no model
    ("gradual_sparsity", [90], ValueError, ["90"]),
    ("data.load", ["cifar"], ValueError, ["'cifar'", "cifar10"]),
    ("models.create", ["lenet"], ValueError, ["'lenet'", "lenet300"]),
    ("models.create", ["lenet300", "10"], ValueError, ["num_classes", "'10'"]),
    ("controls.overlap", [{}, 3], TypeError, ["3"]),
    ("load", ["none.safetensors"], FileNotFoundError, ["none.safetensors"]),
    ("load", [nn.Linear(1, 1)], TypeError, ["path", "Linear"]),
]


@pytest.fixture(scope="module")
def given():
    images = pu.data.load("digits")[1].subset(64)
    inputs, targets = next(images.batches(8, shuffle=False))
    model, other = pu.models.create("lenet300"), pu.models.create("lenet5")
    masks = pu.prune(model, "random", 0.1)
    return types.SimpleNamespace(
        model=model,
        fc1=model.fc1,
        state=model.state_dict(),
        masks=masks,
        images=images,
        inputs=inputs,
        batch=(inputs, targets),
        short=(inputs, targets[:3]),
        beyond=(inputs, targets + 10),
        arrays=(np.asarray(inputs), np.asarray(targets)),
        two=(images, images),
        stranger=torch.optim.SGD(other.parameters(), lr=0.1),
    )


def filled(value, given):
    if isinstance(value, list):
        return [filled(each, given) for each in value]
    return getattr(given, value[1:]) if isinstance(value, str) and value.startswith("$") else value


def assert_raises(error, named, call, *arguments, **options):
    with pytest.raises(error) as raised:
        call(*arguments, **options)
    assert type(raised.value) is error and len(str(raised.value)) < 600
    for word in named:
        assert word in str(raised.value)


@pytest.mark.parametrize(("name", "options", "error", "named"), WRONG)
def test_a_wrong_call_names_what_is_wrong_and_changes_nothing(name, options, error, named, given):
    model, random = given.model, torch.get_rng_state()
    before = copy.deepcopy(model.state_dict())
    options = {key: filled(value, given) for key, value in options.items()}
    assert_raises(error, named, getattr(pu, name), model, **options)
    assert torch.equal(torch.get_rng_state(), random) and model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(mask, given.masks[key]) for key, mask in pu.get_masks(model).items())


@pytest.mark.parametrize(("name", "options"), TAKES_A_MODEL)
def test_what_is_no_model_is_named(name, options, given):
    options = {key: filled(value, given) for key, value in options.items()}
    for value in NOT_A_MODEL:
        value = filled(value, given)
        kind = repr(value) if value is None or isinstance(value, (str, type)) else type(value).__name__
        assert_raises(TypeError, ["model must be", kind], getattr(pu, name), value, **options)


@pytest.mark.parametrize(("name", "arguments", "error", "named"), ELSEWHERE)
def test_other_functions_name_what_is_wrong(name, arguments, error, named):
    assert_raises(error, named, operator.attrgetter(name)(pu), *arguments)


@pytest.mark.parametrize("number", [0.9, torch.tensor(0.9), torch.tensor(0.9, dtype=torch.float64), np.float32(0.9)])
def test_numbers_of_torch_and_numpy_are_numbers(number):
    assert pu.prune(pu.models.create("lenet300"), "magnitude", number).kept == 26620
    kept = [pu.prune_threshold(pu.models.create("lenet300"), t).kept for t in (0.05, torch.tensor(0.05).double())]
    assert kept[0] == kept[1]


WRAPPERS = [lambda model: model, torch.compile, nn.DataParallel, lambda model: nn.DataParallel(torch.compile(model))]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_masks_of_a_wrapped_model_fit_the_bare_one_and_the_other_way_round(wrapper):
    for source, target in [(wrapper, WRAPPERS[0]), (WRAPPERS[0], wrapper), (wrapper, wrapper)]:
        pruned, model = pu.models.create("lenet300"), pu.models.create("lenet300", seed=1)
        pu.set_masks(target(model), pu.prune(source(pruned), "random", 0.5))
        assert all(torch.equal(pu.get_masks(model)[name], mask) for name, mask in pu.get_masks(pruned).items())


def test_an_error_inside_of_a_model_gets_a_note_of_the_shapes():
    model, targets = pu.models.create("lenet5"), torch.zeros(2, dtype=torch.long)
    for call in (pu.accuracy, lambda model, data: pu.fit(model, data, epochs=1)):
        with pytest.raises(RuntimeError) as raised:
            call(model, (torch.zeros(2, 3, 28, 28), targets))
        assert "(2, 3, 28, 28) float32, the targets (2,) int64" in raised.value.__notes__[0]
