"""Wrong calls end in an error that says what to do, before anything changes."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

import pruneutils as pu

MODEL, STATE = "model must be an nn.Module, not ", "a dict of tensors .OrderedDict.; model.load_state_dict"
TEXT = "the text 'resnet20'; pu.models.create makes a model of a name"
SWAPPED = "a Images; is it in the place of another argument"

# the call, the error, what it says (a regular expression)
WRONG = [
    # --- What is not a model -----------------------------------------------------------------------------------------
    ("pu.prune(state, sparsity=.5)", TypeError, MODEL + STATE),
    ("pu.prune('resnet20', sparsity=.5)", TypeError, MODEL + TEXT),
    ("pu.prune(nn.Linear, sparsity=.5)", TypeError, MODEL + r"the class Linear; make a model of it, Linear\("),
    ("pu.prune(None, sparsity=.5)", TypeError, MODEL + "None"),
    ("pu.prune(list(model.parameters()), sparsity=.5)", TypeError, MODEL + "a list"),
    ("pu.prune('magnitude', model, .9)", TypeError, MODEL + "the text 'magnitude'"),
    ("pu.prune_threshold(state, .1)", TypeError, MODEL + STATE),
    ("pu.prune_filters(state, 'l1', .5, inputs)", TypeError, MODEL + STATE),
    ("pu.scores('magnitude', model)", TypeError, MODEL + "the text 'magnitude'"),
    ("pu.accuracy(test, model)", TypeError, MODEL + "an Images; is it in the place of another argument"),
    ("pu.count(state)", TypeError, MODEL + STATE),
    ("pu.count(masks)", TypeError, MODEL + r"a dict of tensors \(Masks\)"),
    ("pu.layer_table('resnet20')", TypeError, MODEL + TEXT),
    ("pu.get_masks(state)", TypeError, MODEL + STATE),
    ("pu.set_masks(masks, model)", TypeError, MODEL + "a dict of tensors"),
    ("pu.hold(state)", TypeError, MODEL + STATE),
    ("pu.restore(state)", TypeError, MODEL + STATE),
    ("pu.make_permanent('resnet20')", TypeError, MODEL + TEXT),
    ("pu.recalibrate(test, model)", TypeError, MODEL + "an Images"),
    ("pu.fit(test, model, epochs=1)", TypeError, MODEL + "an Images"),
    ("pu.fit(state, batch, epochs=1)", TypeError, MODEL + STATE),
    ("pu.gradual(test, model)", TypeError, MODEL + "an Images"),
    ("pu.lottery_ticket(state, batch, sparsity=.5)", TypeError, MODEL + STATE),
    ("pu.save(path, model)", TypeError, MODEL + "the text .*; pu.load makes a model of a file"),
    ("pu.save(state, path)", TypeError, MODEL + STATE),
    ("pu.load(model, path)", TypeError, "path must be the path of a file, not a Sequential; .* changed places"),
    ("pu.models.load_weights(path, model)", TypeError, "path must be .* not a Sequential; .* changed places"),
    ("pu.models.load_weights(model, state)", TypeError, "path must be .* OrderedDict; model.load_state_dict takes"),
    ("pu.plots.layer_histograms(state)", TypeError, MODEL + STATE),
    # --- Layers by name ----------------------------------------------------------------------------------------------
    ("pu.prune(resnet, sparsity=.5, exclude=['layer1'])", ValueError, r"'layer1'; did you mean 'layer1\.\*'"),
    ("pu.prune(resnet, 'magnitude', {'layer1': .5})", ValueError, r"'layer1'; did you mean 'layer1\.\*'"),
    ("pu.prune(model, sparsity=.5, exclude=[model.fc1])", TypeError, "globs of layers, not a Linear; say 'fc1'"),
    ("pu.prune(model, sparsity=.5, exclude=model.fc1)", TypeError, "globs of layers, not a Linear; say 'fc1'"),
    ("pu.prune(model, sparsity=.5, exclude=[0])", TypeError, "names or globs of layers, not 0"),
    ("pu.prune(model, sparsity=.5, exclude=None)", TypeError, "names or globs of layers, .* not None"),
    ("pu.prune(model, sparsity=.5, exclude='*')", ValueError, r"exclude='\*' leaves nothing to prune"),
    ("pu.prune(model, 'magnitude', {model.fc1: .5})", TypeError, "by name or glob, such as 'fc1', not Linear"),
    ("pu.prune(model, 'magnitude', {'fc9': .5})", ValueError, "no prunable layer fits 'fc9'; did you mean 'fc3'"),
    ("pu.set_masks(model, {'fc1': torch.ones(300, 784)})", ValueError, "did you mean 'fc1.weight'"),
    # --- How much ----------------------------------------------------------------------------------------------------
    ("pu.prune(model, 'magnitude', 90)", ValueError, r"a fraction in \[0, 1\],.* 90"),
    ("pu.prune(model, 'magnitude', '0.9')", ValueError, r"a fraction in \[0, 1\], not '0.9'"),
    ("pu.prune(model, 'magnitude', float('nan'))", ValueError, r"a fraction in \[0, 1\], not nan"),
    ("pu.prune(model, 'magnitude', -.1)", ValueError, r"a fraction in \[0, 1\], not -0.1"),
    ("pu.prune(model, 'magnitude', True)", ValueError, r"a fraction in \[0, 1\], not True"),
    ("pu.prune(model, 'magnitude', [.9])", ValueError, r"a fraction in \[0, 1\], not \[0.9\]"),
    ("pu.prune(model, 'magnitude', torch.tensor([.9, .5]))", ValueError, r"a fraction in \[0, 1\], not tensor"),
    ("pu.prune(model, 'magnitude')", ValueError, r"sparsity must be a fraction in \[0, 1\], such as sparsity=0.9"),
    ("pu.prune(model, .9)", TypeError, "criterion must be a name or a callable .*, not 0.9; is sparsity=0.9 meant"),
    ("pu.prune(model, .9, 'magnitude')", TypeError, "criterion must be .*, not 0.9; is sparsity=0.9 meant"),
    ("pu.prune(model, amount=.9)", TypeError, "no option amount; .*how much goes is called sparsity"),
    ("pu.prune(model, 'magnitude', {'fc1': 50})", ValueError, r"sparsity of 'fc1' must be a fraction in \[0, 1\]"),
    ("pu.prune(model, 'magnitude', {})", ValueError, "sparsity is an empty mapping"),
    ("pu.prune(model, 'magnitude', .9, granularity='2:4')", ValueError, "2:4 makes the sparsity 0.5, not 0.9"),
    ("pu.prune_threshold(model, 'magnitude', .1)", ValueError, "threshold must be a number, not 'magnitude'"),
    ("pu.prune_filters(lenet5, 'l1', 50, inputs)", ValueError, r"ratio must be a fraction in \[0, 1\], not 50"),
    ("pu.gradual_sparsity(90)", ValueError, r"a fraction in \[0, 1\], not 90"),
    ("pu.sparsity_at(2, .9)", ValueError, r"progress must be a fraction in \[0, 1\], not 2"),
    ("pu.erk_sparsities({'fc1': (3, 4)}, 90)", ValueError, r"sparsity must be a fraction in \[0, 1\], not 90"),
    ("pu.erk_sparsities(model, .9)", TypeError, "shapes must be .* not a Sequential"),
    # --- Names -------------------------------------------------------------------------------------------------------
    ("pu.prune(model, 'SNIP', .9, data=batch)", ValueError, "unknown criterion 'SNIP'; did you mean 'snip'"),
    ("pu.prune(model, 'snipp', .9, data=batch)", ValueError, "did you mean 'snip'"),
    ("pu.inverted('snipp')", ValueError, "did you mean 'snip'"),
    ("pu.prune(model, 'magnitude', .5, scope='Global')", ValueError, "unknown scope 'Global'; did you mean 'global'"),
    ("pu.prune(model, 'magnitude', .5, scope='layerwise')", ValueError, "did you mean 'layer'"),
    ("pu.prune(model, 'magnitude', .5, granularity='Filter')", ValueError, "did you mean 'filter'"),
    ("pu.prune(model, 'magnitude', granularity='5:4')", ValueError, "not N:M .* such as 2:4"),
    ("pu.prune(model, 'magnitude', .5, granularity=pu.Block)", TypeError, r"an object such as pu.Block\(4, 4\)"),
    ("pu.prune(model, 'magnitude', .9, iterations=2, schedule='exp')", ValueError, "did you mean 'exponential'"),
    ("pu.prune(model, 'magnitude', .9, temprature=3)", TypeError, "'magnitude' has no option temprature"),
    ("pu.prune_filters(lenet5, 'mag', .5, inputs)", ValueError, "did you mean 'mag_based'"),
    ("pu.prune_filters(lenet5, 'l1', .5, inputs, of='flops')", ValueError, "known: filters, parameters, macs"),
    ("pu.fit(model, batch, epochs=1, optimizer='SGD')", ValueError, "did you mean 'sgd'"),
    ("pu.fit(model, batch, epochs=1, lr_schedule='Cosine')", ValueError, "did you mean 'cosine'"),
    ("pu.fit(model, batch, epochs=1, precision='bf16')", ValueError, "did you mean 'bfloat16'"),
    ("pu.gradual(model, batch, lrr=.1)", TypeError, "fit has no argument 'lrr'; did you mean 'lr'"),
    ("pu.data.load('cifar')", ValueError, "did you mean 'cifar10' or 'cifar100'"),
    ("pu.data.load('Digits')", ValueError, "did you mean 'digits'"),
    ("pu.models.create('lenet')", ValueError, "did you mean 'lenet300' or 'lenet5'"),
    ("pu.models.create('ResNet20')", ValueError, "did you mean 'resnet20'"),
    ("pu.models.create(model)", ValueError, "unknown model a Sequential"),
    ("pu.models.create('lenet300', in_chans=3)", TypeError, "no option 'in_chans'; its own: in_channels, image_size"),
    ("pu.sparsity_explorer(model)", AttributeError, "did you mean pu.widgets.[sS]parsity_?[eE]xplorer"),
    ("pu.SparsityExplorer(model)", AttributeError, "did you mean pu.widgets.[sS]parsity_?[eE]xplorer"),
    ("pu.Prune(model)", AttributeError, "did you mean pu.prune"),
    ("pu.acuracy(model, batch)", AttributeError, "did you mean 'pu.accuracy'"),
    ("pu.summary(model)", AttributeError, "did you mean pu.statistics.summary"),
    # --- Data --------------------------------------------------------------------------------------------------------
    ("pu.prune(model, 'snip', .9)", ValueError, "criterion 'snip' needs data"),
    ("pu.prune(model, 'snip', .9, data=inputs)", TypeError, "data must be one .inputs, targets. pair .* not a Tensor"),
    ("pu.prune(model, 'snip', .9, data='digits')", TypeError, r"data is the text 'digits'; pu.data.load\('digits'\)"),
    ("pu.prune(model, 'snip', .9, data=(test, test))", TypeError, "data holds two data sets"),
    ("pu.prune(model, 'snip', .9, data=[])", ValueError, "data holds no sample"),
    ("pu.prune(model, 'snip', .9, data=batch[::-1])", ValueError, "seem to have changed places"),
    ("pu.accuracy(model, batch[::-1])", ValueError, r"inputs are \(8,\) int64 .* seem to have changed places"),
    ("pu.accuracy(model, None)", TypeError, "data must be one .* not None"),
    ("pu.accuracy(model, inputs)", TypeError, "data must be one .* not a Tensor"),
    ("pu.accuracy(model, 'digits')", TypeError, "data is the text 'digits'"),
    ("pu.accuracy(model, tuple(map(np.asarray, batch)))", TypeError, "a batch must be .* not a ndarray"),
    ("pu.accuracy(model, (test, test))", TypeError, "data holds two data sets"),
    ("pu.accuracy(model, (inputs, batch[1][:3]))", ValueError, r"shape \(8, 10\) and targets of shape \(3,\)"),
    ("pu.accuracy(model, batch, topk=0)", ValueError, "topk must be a whole number of at least 1, not 0"),
    ("pu.fit(model, 'digits', epochs=1)", TypeError, "train is the text 'digits'"),
    ("pu.fit(model, (test, test), epochs=1)", TypeError, "train holds two data sets"),
    ("pu.fit(model, None, epochs=1)", TypeError, "train must be re-iterable"),
    ("pu.fit(model, iter([batch]), epochs=1)", TypeError, "train must be re-iterable"),
    ("pu.fit(model, batch, 5)", TypeError, "test must be one .inputs, targets. pair .* not 5"),
    ("pu.fit(model, batch, iter([batch]), epochs=1)", TypeError, "test must be re-iterable"),
    ("pu.fit(model, (inputs, batch[1][:3]), epochs=1)", ValueError, "inputs of 8 samples, and targets of 3"),
    ("pu.fit(model, (inputs, batch[1].float()), epochs=1)", ValueError, "whole numbers such as int64, not float32"),
    ("pu.fit(model, (inputs, batch[1] + 10), epochs=1)", ValueError, "targets of 1.* no classes of these 10 outputs"),
    ("pu.fit(model, batch[::-1], epochs=1)", ValueError, "seem to have changed places"),
    ("pu.data.load('imagefolder', size='32')", ValueError, "size must be a whole number of at least 1, not '32'"),
    ("test.subset(10**6)", ValueError, "n must lie between 1 and the number of images, 64, got 1000000"),
    # --- Training ----------------------------------------------------------------------------------------------------
    ("pu.fit(model, batch, epochs=0)", ValueError, "epochs must be a whole number of at least 1, not 0"),
    ("pu.fit(model, batch, epochs=1.5)", ValueError, "epochs must be a whole number of at least 1, not 1.5"),
    ("pu.fit(model, batch, epochs=1, batch_size=0)", ValueError, "batch_size must be a whole number of at least 1"),
    ("pu.fit(model, batch, epochs=1, seed=-1)", ValueError, "seed must be a whole number of at least 0, not -1"),
    ("pu.fit(model, batch, epochs=1, lr='0.1')", ValueError, "lr must be a finite number of at least 0, not '0.1'"),
    ("pu.fit(model, batch, epochs=1, lr=float('nan'))", ValueError, "lr must be a finite number of at least 0"),
    ("pu.fit(model, batch, epochs=1, weight_decay=-1)", ValueError, "weight_decay must be a finite number"),
    ("pu.fit(model, batch, epochs=1, loss_fn='mse')", TypeError, "loss_fn must be a function, not 'mse'"),
    ("pu.fit(model, batch, epochs=1, on_step=3)", TypeError, "on_step must be a function, not 3"),
    ("pu.fit(model, batch, epochs=1, start_step=9)", ValueError, "start_step=9 is beyond the end of training after 1"),
    ("pu.fit(model, batch, epochs=1, optimizer=lambda p: None)", TypeError, "must return a torch Optimizer, not None"),
    (
        "pu.fit(model, batch, epochs=1, optimizer=torch.optim.SGD(lenet5.parameters(), lr=.1))",
        ValueError,
        r"the optimizer \(SGD\) updates no parameter of this Sequential",
    ),
    ("pu.gradual(model, batch, sparsities=.9)", ValueError, r"fractions such as \[0.5, 0.9\], not 0.9"),
    ("pu.gradual(model, batch, sparsities='0.9')", ValueError, "a list of ascending fractions .* not '0.9'"),
    ("pu.gradual(model, batch, sparsities=[])", ValueError, r"a list of ascending fractions .* not \[\]"),
    ("pu.gradual(model, batch, sparsities=[.9, .5])", ValueError, r"ascending fractions, not \[0.9, 0.5\]"),
    ("pu.gradual(model, batch, epochs_each=0)", ValueError, "epochs_each must be a whole number of at least 1"),
    ("pu.lottery_ticket(model, batch, sparsity=.9, rounds=0)", ValueError, "rounds must be a whole number"),
    ("pu.prune(model, 'random', .9, seed='a')", ValueError, "seed must be a whole number of at least 0, not 'a'"),
    ("pu.prune(model, 'magnitude', .9, iterations=0)", ValueError, "iterations must be a whole number of at least 1"),
    ("pu.models.create('lenet5', seed='a')", ValueError, "seed must be a whole number of at least 0, not 'a'"),
    ("pu.models.create('lenet5', num_classes='10')", ValueError, "num_classes must be a whole number of at least 1"),
    # --- Masks and files ---------------------------------------------------------------------------------------------
    ("pu.set_masks(model, [1, 2])", TypeError, "masks must be .parameter name: mask., not a list"),
    ("pu.set_masks(model, lenet5)", TypeError, "not a Sequential; pu.get_masks.model. gives the masks of a model"),
    ("pu.set_masks(model, {'fc3.weight': 'all'})", TypeError, "fc3.weight: a mask is a tensor of 0 and 1, not 'all'"),
    ("pu.set_masks(model, {'fc3.weight': torch.ones(3, 1)})", ValueError, r"shape \(3, 1\), the weight \(10, 100\)"),
    ("pu.overlap(model, model)", TypeError, "masks must be .* not a Sequential; pu.get_masks"),
    ("pu.shuffle_masks(model)", TypeError, "masks must be .* not a Sequential; pu.get_masks"),
    ("pu.save(model, path, acc=torch.tensor(.9))", TypeError, "the fact 'acc' is Tensor"),
    ("pu.save(model, folder)", ValueError, "is a folder; name a file in it"),
    ("pu.load(folder)", ValueError, "is a folder, not a file"),
    ("pu.load(path)", FileNotFoundError, "there is no file .*none.safetensors"),
    ("pu.load(empty)", ValueError, r"empty.pt .* It is empty \(0 bytes\)"),
    ("pu.load(cut, model)", ValueError, r"cut.pt is no whole safetensors file"),
    ("pu.load(torchs)", ValueError, r"looks like a file of torch.save; pu.models.load_weights\(model, path\)"),
    ("pu.models.load_weights(model, empty)", ValueError, r"empty.pt is empty \(0 bytes\)"),
    ("pu.models.load_weights(model, cut)", ValueError, "cut.pt is damaged"),
    ("pu.models.load_weights(lenet5, torchs)", ValueError, "does not fit this Sequential; keys missing: conv1.weight"),
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    torchs, empty, cut = folder / "torch.pt", folder / "empty.pt", folder / "cut.pt"
    torch.save(pu.models.create("lenet300").state_dict(), torchs)
    empty.write_bytes(b"")
    cut.write_bytes(torchs.read_bytes()[:3000])
    paths = dict(folder=folder, torchs=torchs, empty=empty, cut=cut, path=folder / "none.safetensors")
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture(scope="module")
def images():
    return pu.data.load("digits")[1].subset(64)


@pytest.fixture(scope="module")
def models():
    models = {name: pu.models.create(name) for name in ("lenet300", "lenet5", "resnet20")}
    masks = pu.prune(models["lenet300"], "random", 0.1)
    return dict(model=models["lenet300"], lenet5=models["lenet5"], resnet=models["resnet20"], masks=masks)


@pytest.mark.parametrize(("call", "error", "told"), WRONG, ids=[call for call, _, _ in WRONG])
def test_a_wrong_call_says_what_to_do_and_changes_nothing(call, error, told, models, images, files):
    inputs, targets = next(images.batches(8, shuffle=False))
    given = dict(models, **files, test=images, batch=(inputs, targets), inputs=inputs, pu=pu, torch=torch, nn=nn, np=np)
    watched = [models[name] for name in ("model", "lenet5", "resnet")]
    given["state"] = models["model"].state_dict()
    before = [(copy.deepcopy(model.state_dict()), pu.get_masks(model), model.training) for model in watched]
    random = torch.get_rng_state()
    with pytest.raises(error, match=re.compile(told, re.S)) as raised:
        eval(call, given)
    assert type(raised.value) is error and len(str(raised.value)) < 600
    assert torch.equal(torch.get_rng_state(), random)
    for model, (state, masks, training) in zip(watched, before):
        assert model.training == training
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name
        for name, mask in pu.get_masks(model).items():
            assert torch.equal(mask, masks[name]), name
        assert len(masks) == len(pu.get_masks(model))


@pytest.mark.parametrize("number", [0.9, torch.tensor(0.9), torch.tensor(0.9, dtype=torch.float64), np.float32(0.9)])
def test_numbers_of_torch_and_numpy_are_numbers(number):
    assert pu.prune(pu.models.create("lenet300"), "magnitude", number).kept == 26620
    kept = [pu.prune_threshold(pu.models.create("lenet300"), t).kept for t in (0.05, torch.tensor(0.05).double())]
    assert kept[0] == kept[1]


class Wrapper(nn.Module):
    """Holds a model as DataParallel does."""

    def __init__(self, model):
        super().__init__()
        self.module = model


WRAPPERS = {
    "bare": lambda model: model,
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
    "both": lambda model: Wrapper(torch.compile(model)),
    "inside": lambda model: nn.Sequential(torch.compile(model)),
}


@pytest.mark.parametrize("target", list(WRAPPERS)[:4])
@pytest.mark.parametrize("source", list(WRAPPERS)[:4])
def test_masks_of_a_wrapped_model_fit_the_bare_one_and_the_other_way_round(source, target):
    pruned, model = pu.models.create("lenet300"), pu.models.create("lenet300", seed=1)
    masks = pu.prune(WRAPPERS[source](pruned), "random", 0.5)
    pu.set_masks(WRAPPERS[target](model), masks)
    for name, mask in pu.get_masks(pruned).items():
        assert torch.equal(pu.get_masks(model)[name], mask)


def test_one_weight_takes_one_mask():
    model, keep = pu.models.create("lenet300"), torch.ones(10, 100)
    with pytest.raises(ValueError, match="fc3.weight is given two masks, one of them as 'module.fc3.weight'"):
        pu.set_masks(model, {"fc3.weight": keep, "module.fc3.weight": keep})
    assert not pu.get_masks(model)


def test_an_error_inside_of_a_model_tells_what_the_model_was_given():
    model, targets = pu.models.create("lenet5"), torch.zeros(2, dtype=torch.long)
    for call in (pu.accuracy, lambda model, data: pu.fit(model, data, epochs=1)):
        with pytest.raises(RuntimeError) as raised:
            call(model, (torch.zeros(2, 3, 28, 28), targets))
        assert raised.value.__notes__ == ["The inputs were (2, 3, 28, 28) float32, the targets (2,) int64."]
