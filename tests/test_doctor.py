"""The doctor finds what is wrong with sick models, by name, and nothing on healthy ones."""

import copy

import pandas as pd
import pytest
import torch
from torch import nn

import pruneutils as pu
from pruneutils import doctor


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 32),
            nn.ReLU(),
            nn.Linear(32, 5),
        )


def samples(n=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 6, 6, generator=generator), torch.randint(5, (n,), generator=generator)


def trained():
    """A pruned model with its optimizer, after a few steps."""
    model = net()
    pu.prune(model, "magnitude", 0.5, scope="layer")
    optimizer = torch.optim.Adam(model.parameters())
    pu.fit(model, samples(), epochs=8, batch_size=16, optimizer=optimizer)
    return model, optimizer


def names(findings):
    return {finding.check for finding in findings}


# --- Twelve sick models: what is done to a healthy one, the check that finds it, how bad, where, and what to call -----


def write_to_pruned_weights(model, optimizer):
    with torch.no_grad():
        model[4].weight += 0.1


def prune_by_hand(model, optimizer):
    pu.make_permanent(model)


def replace_by_the_same_shape(model, optimizer):
    model[4].weight = nn.Parameter(torch.ones(32, 128))
    optimizer.param_groups[0]["params"] = list(model.parameters())


def replace_by_another_shape(model, optimizer):
    model[6].weight = nn.Parameter(torch.randn(7, 32))
    optimizer.param_groups[0]["params"] = list(model.parameters())


def exchange_a_layer(model, optimizer):
    model[6] = nn.Linear(32, 5)


def shift_the_statistics(model, optimizer):
    model[1].running_mean += 2 * model[1].running_var.sqrt()


def empty_a_layer(model, optimizer):
    pu.set_masks(model, {"4.weight": torch.zeros(32, 128)})


def cut_the_paths(model, optimizer):
    keep = pu.get_masks(model)
    keep["6.weight"][:, :16] = False  # nothing reads half of the hidden units
    pu.set_masks(model, keep)


def tie_at_the_cut(model, optimizer):
    with torch.no_grad():
        model[4].weight.copy_(model[4].weight.sign() * 1e-3)


def silence_a_class(model, optimizer):
    keep = pu.get_masks(model)
    keep["6.weight"][3] = False
    pu.set_masks(model, keep)


def tie_two_weights(model, optimizer):
    model.add_module("decoder", nn.Linear(128, 32))
    model.decoder.weight = model[4].weight
    model.decoder.forward = lambda x: x
    optimizer.param_groups[0]["params"] = list(model.parameters())


def break_a_weight(model, optimizer):
    model[4].bias.data[2] = float("nan")


def leave_much_outside(model, optimizer):
    model.add_module("embedding", nn.Embedding(1000, 8))
    model.embedding.forward = lambda x: x
    optimizer.param_groups[0]["params"] = list(model.parameters())


SICK = [
    (write_to_pruned_weights, "revived_weights", "error", "4", "pu.hold"),
    (prune_by_hand, "zeros_without_mask", "warning", "0, 4, 6", "pu.set_masks"),
    (replace_by_the_same_shape, "lost_masks", "warning", "4.weight", "pu.hold"),
    (replace_by_another_shape, "lost_masks", "error", "6.weight", "pu.set_masks"),
    (exchange_a_layer, "foreign_optimizer", "error", "Adam", "make the optimizer anew"),
    (shift_the_statistics, "stale_statistics", "warning", "1", "pu.recalibrate"),
    (empty_a_layer, "empty_layers", "error", "4", "scope='layer'"),
    (cut_the_paths, "disconnected_paths", "warning", "4", "pu.dead_weights"),
    (tie_at_the_cut, "ties_at_the_cut", "note", "4", "finer scores"),
    (silence_a_class, "pruned_classifier", "error", "6", "exclude='6'"),
    (tie_two_weights, "tied_weights", "note", "4.weight = decoder.weight", "exclude='4'"),
    (break_a_weight, "non_finite", "error", "4.bias", "smaller lr"),
    (leave_much_outside, "outside_every_mask", "note", "embedding.weight", "pu.count"),
]


@pytest.mark.parametrize(("harm", "name", "severity", "where", "call"), SICK, ids=[row[0].__name__ for row in SICK])
def test_every_sickness_is_found_by_name(harm, name, severity, where, call):
    model, optimizer = trained()
    assert not pu.check(model, optimizer, samples())
    harm(model, optimizer)
    state, grads = copy.deepcopy(model.state_dict()), [p.grad for p in model.parameters()]
    held = {key: None if mask is None else mask.keep for key, mask in masks_of(model).items()}
    findings = pu.check(model, optimizer, samples())
    found = [finding for finding in findings if finding.check == name]
    assert found and all(call in each.call for each in found), findings
    assert (found[0].severity, found[0].where) == (severity, where)
    order = [doctor.SEVERITIES.index(each.severity) for each in findings]
    assert order == sorted(order)
    # nothing was changed, not even a mask that will move
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]) or not value.isfinite().all(), key
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads))
    assert all((None if mask is None else mask.keep) is held[key] for key, mask in masks_of(model).items())


def masks_of(model):
    return {name: pu._masks.mask_of(parameter) for name, parameter in model.named_parameters()}


CURED = {
    write_to_pruned_weights: lambda model, data: pu.hold(model),
    prune_by_hand: lambda model, data: pu.set_masks(
        model, {name: w != 0 for name, w in pu.prunable_weights(model).items()}
    ),
    replace_by_the_same_shape: lambda model, data: pu.hold(model),
    replace_by_another_shape: lambda model, data: pu.set_masks(model, {"6.weight": torch.rand(7, 32) < 0.5}),
    shift_the_statistics: lambda model, data: pu.recalibrate(model, data),
}


@pytest.mark.parametrize("harm", CURED, ids=lambda harm: harm.__name__)
def test_what_the_finding_says_to_call_cures_it(harm):
    model, optimizer = trained()
    harm(model, optimizer)
    assert pu.check(model, data=samples())
    CURED[harm](model, samples())
    assert not pu.check(model, data=None if harm is replace_by_another_shape else samples())


@pytest.mark.parametrize("name", ["lenet300", "lenet5", "vgg16_bn", "resnet20", "mobilenet_v1"])
def test_fresh_and_pruned_models_are_healthy(name):
    model = pu.models.create(name)
    shape = (4, 1, 28, 28) if name.startswith("lenet") else (4, 3, 32, 32)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for sparsity in (0.0, 0.5):
        if sparsity:
            pu.prune(model, "magnitude", sparsity, scope="layer")
        findings = pu.check(model, torch.optim.SGD(model.parameters(), lr=0.1), inputs)
        assert findings == [] and not findings


def test_a_trained_model_is_healthy_and_one_that_was_only_pruned_has_stale_statistics():
    train, test = pu.data.load("digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 50), nn.BatchNorm1d(50), nn.ReLU(), nn.Linear(50, 10))
    pu.fit(model, train.subset(1280), epochs=3, lr=0.02)
    assert not pu.check(model, data=train)
    pu.prune(model, "magnitude", 0.97, exclude="4")
    assert names(pu.check(model, data=train)) == {"stale_statistics"}
    pu.recalibrate(model, train.subset(500))
    assert not pu.check(model, data=train)


def test_taps_that_only_ever_meet_padding_are_no_cut_paths():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten())
    pu.prune(model, "random", 0.5, scope="layer")
    assert not pu.check(model, data=torch.ones(1, 2, 1, 1))
    keep = pu.get_masks(model)
    keep["2.weight"][:, 1:] = False
    pu.set_masks(model, keep)
    (found,) = pu.check(model, data=torch.ones(1, 2, 1, 1))
    useful = [keep[name][:, :, 1, 1] for name in keep]
    lost, total = int(useful[0][1:].sum()), int(useful[0].sum() + useful[1].sum())
    assert (found.check, found.where) == ("disconnected_paths", "0")
    assert found.what.startswith(f"{lost} of {total} kept weights have no effect")


def test_findings_are_a_table_in_jupyter_and_text_elsewhere():
    model, optimizer = trained()
    healthy = pu.check(model)
    assert repr(healthy) == healthy._repr_html_() == "no findings" and healthy.table().empty and healthy.empty
    write_to_pruned_weights(model, optimizer)
    findings = pu.check(model)
    table = findings.table()
    assert isinstance(table, pd.DataFrame) and list(table) == ["severity", "what", "where", "call", "check"]
    assert "<table" in findings._repr_html_() and table.call[0].replace("&", "") in findings._repr_html_()
    assert repr(findings).startswith("error: 2,") and "pu.hold(model)" in repr(findings)


def test_a_new_check_is_a_short_function(monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", dict(doctor.CHECKS))

    @doctor.checks
    def large_weights(patient):
        """Weights above 100."""
        large = {name: w for name, w in patient.weights.items() if w.abs().max() > 100}
        if large:
            yield doctor.Finding("warning", "weights above 100", ", ".join(large), "train with weight decay")

    model = net()
    assert not pu.check(model)
    model[4].weight.data[0, 0] = 1000
    (found,) = pu.check(model)
    assert (found.check, found.where) == ("large_weights", "4.weight")


def test_the_doctor_sees_patients_alone():
    model = net()
    with pytest.raises(TypeError, match="model must be an nn.Module"):
        pu.check(model.state_dict())
    with pytest.raises(TypeError, match="optimizer must be a torch Optimizer, not a list"):
        pu.check(model, list(model.parameters()))
    with pytest.raises(TypeError, match="data is the text 'digits'"):
        pu.check(model, data="digits")
    with pytest.raises(ValueError, match="data holds no sample"):
        pu.check(model, data=[])


def test_an_optimizer_that_leaves_parameters_out_is_told():
    model = net()
    (found,) = pu.check(model, torch.optim.SGD(model[6].parameters(), lr=0.1))
    assert (found.check, found.severity) == ("foreign_optimizer", "warning") and "does not train 6 of 8" in found.what
    for parameter in model[:6].parameters():
        parameter.requires_grad_(False)
    assert not pu.check(model, torch.optim.SGD(model[6].parameters(), lr=0.1))


def test_removed_filters_ask_for_a_rebound_optimizer():
    model = pu.models.create("lenet5")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pu.prune_filters(model, "l1", 0.5, torch.randn(1, 1, 28, 28))
    assert {"foreign_optimizer"} == names(pu.check(model, optimizer))
    pu.rebind_optimizer(optimizer, model)
    assert not pu.check(model, optimizer)
