"""Write *What we found* of README, and results/README.md, from the records: `make findings`, whenever they have grown.

Each finding is a function that computes its sentence, with an interval, from the largest size recorded; it returns None
as long as too little is recorded. README has the first five that say something. A test holds README to what this
computes.
"""

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import recordings

import pruneutils as pu
from pruneutils import studies

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- findings: written by `make findings` from the records in results/ -->\n"
END = "<!-- end of findings -->"
_FEWEST = 5  # seeds

FINDINGS: list[tuple[str, Callable[[], str | None]]] = []


def finding(notebook: str) -> Callable:
    """Register a finding of a notebook; those registered first come first."""

    def register(function):
        FINDINGS.append((notebook, function))
        return function

    return register


def recorded(name: str) -> pd.DataFrame | None:
    """Return the finished runs of the largest size recorded, None if there are none."""
    with contextlib.redirect_stdout(io.StringIO()):  # what it says to do is for notebooks
        frames = pu.notebook.recorded(name)
    return list(frames.values())[-1] if frames else None


def interval(row: pd.Series, form: str = "{:.1f}", scale: float = 100) -> str:
    """Write a mean of `statistics.summary` with its interval: 2.1 % [2.0, 2.2]."""
    mean, low, high = (form.format(scale * row[name]) for name in ("mean", "low", "high"))
    return f"{mean} % [{low}, {high}]"


@finding("one_shot_imagenet")
def robustness_is_in_the_statistics() -> str | None:
    """What recalibrated batch norm gives back, and what is then left of the larger network's robustness."""
    frame = recorded("one_shot_imagenet")
    if frame is None or frame[frame.repair == "recalibrated"].seed.nunique() < _FEWEST:
        return None
    everything = studies.hits_by_image(frame)
    images = everything[everything.arm.isin(["dense", "weights, global"])]
    half = images[(images.network == "lite0") & (images.asked == 0.5)]
    (repaired,) = pu.statistics.compare(
        half, by="state", value="hit", against=[("recalibrated", "plain")], pair_on="image"
    ).itertuples()
    both, pairs = ("plain", "recalibrated"), [("lite0", "lite1"), ("lite0", "lite2"), ("lite1", "lite2")]
    tables = [studies.compare_sizes(everything, pairs, state, state) for state in both]  # the families of the notebook
    gaps = [
        table.set_index(["arm", "asked", "a", "b"]).loc[("weights, global", 0.5, "lite0", "lite2")] for table in tables
    ]
    layered = tables[1][(tables[1].arm == "weights, per layer") & (tables[1].asked == 0.5) & (tables[1].b == "lite2")]
    lead, left = (points(gap).replace("+", "") for gap in gaps)
    return (
        "**When EfficientNet-Lite0 loses half of its weights, most of the lost accuracy is due to stale batch-norm "
        f"statistics.** It is then right on {percent(half[half.state == 'plain'].hit.mean())} of 1,000 ImageNet "
        f"images, and measuring batch norm anew gives back {points(repaired)}. Without this repair, Lite0 loses {lead} "
        f"more than the larger Lite2. If all networks are measured anew, the dense ones too, it loses {left} more"
        f"{_unclear(gaps[1])}.{_layered(layered)} "
        f"(Intervals over {repaired.n} images, {frame[frame.repair == 'recalibrated'].seed.nunique()} choices of the "
        "250 that repair.)"
    )


def _unclear(row) -> str:
    return "" if row.differs else ", which cannot be told from zero after Holm"


def _layered(rows) -> str:
    """What is left of the lead where each layer loses the same share."""
    rows = rows[rows.a == "lite0"]
    told = ((points(row).replace("+", ""), _unclear(row)) for row in rows.itertuples())
    return "".join(f" If each layer loses half, it loses {lead} more{unclear}." for lead, unclear in told)


@finding("gradual_pruning")
def several_prunings() -> str | None:
    """Many prunings against one in three comparisons, at the target at which most arms ran."""
    frame = recorded("prune_adapted")
    if frame is None or frame.seed.nunique() < _FEWEST:
        return None
    target = frame[frame.design != "dense"].target.mode().iloc[0]
    rows = studies.prunings_against_one(studies.last_epochs(frame, target)).set_index(["equal", "a"])
    high = studies.gradual_against_instant(studies.last_epochs(frame)).set_index(["equal", "sparsity"])
    last = high.loc[studies.OWN_WAY].index.max()
    most = f"{frame[frame.design == 'restarts'].prunings.max()} prunings"
    return (
        f"**Whether many prunings beat one depends on what is held equal.** A ResNet-20 loses {percent(target, 0)} of "
        f"its weights while it sees each image four times. The accuracy after {most}, minus that after one, is "
        f"{points(rows.loc[('equal total', most)])} if all arms train equally long in total, and "
        f"{points(rows.loc[('equal recovery', most)])} if all train equally long after the last pruning. A ramp, the "
        "usual form of gradual pruning, minus one pruning before the first epoch, the usual form of instant pruning, "
        f"is {points(rows.loc[(studies.OWN_WAY, 'ramp')])}, and {points(high.loc[(studies.OWN_WAY, last)])} at "
        f"{percent(last, 0)}. What survives all comparisons: {studies.surviving(frame)} "
        f"(one network, {frame.seed.nunique()} orders of the images, {on(frame)})."
    )


@finding("pruning_at_initialization")
def better_than_random() -> str | None:
    """The criteria before training against random pruning and their controls, in every size recorded."""
    with contextlib.redirect_stdout(io.StringIO()):
        frames = pu.notebook.recorded("pruning_at_initialization")
    told = [studied for frame in reversed(frames.values()) if (studied := _before_training(frame))]
    apart = " The two differ in data, training and initial weights, too." if len(told) > 1 else ""
    return f"**{_promise(frames.values())}**{apart} {' '.join(told)}" if told else None


def _promise(frames) -> str:
    """What holds for all networks recorded, as far as anything does."""
    found = {True: set(), False: set()}  # better than random somewhere, worse somewhere
    for frame in frames:
        rows = studies.answers(studies.after_equal_epochs(frame), "is it better than random?")
        for row in rows[(rows.compression == 1) & rows.differs].itertuples():
            found[row.larger == row.a].add(row.a)
    both = sorted(found[True] & found[False])
    if not both:
        return "Pruning before training, against random pruning."
    what = " and ".join(both)
    return f"Before training, {what} beat random pruning in one network and lose to it in another."


def _before_training(frame) -> str | None:
    runs = studies.after_equal_epochs(frame)
    if not (runs.compression == 1).any():
        return None
    network, epochs = studies.in_full(runs.network.iloc[0]), (runs.pre_epochs + runs.epoch).iloc[0]
    told = f"*{network}, {epochs} epochs on {on(runs)}.* {studies.against_random_before_training(runs)} "
    plain = runs[(runs.control == "none") & (runs.compression == 1)]
    seeds = runs.seed.nunique()
    arms = plain[(plain.accuracy < plain.commonest + 0.02) & plain.method.isin(_CRITERIA)]
    if len(arms):
        stuck = arms.groupby("method").seed.nunique()
        told += "With 10 %, at chance: " + ", ".join(
            f"{' and '.join(stuck.index[stuck == n])} in {n} of {seeds} seeds"
            for n in sorted(stuck.unique(), reverse=True)
        )
        told += ". "
    if runs.control.nunique() > 1:
        controls = studies.answers(runs, "is it the weights, or how many in each layer?")
        passed = (controls.larger == "as scored").sum()
        told += f"A method beats its own masks shuffled, redrawn or inverted in {passed} of {len(controls)} controls. "
    return told.strip()


_CRITERIA = ("random", "magnitude", "snip", "grasp", "synflow")


@finding("grasp_threshold_debug")
def threshold_sticks() -> str | None:
    """What the published rule removes, whatever it is asked for."""
    frame = recorded("grasp_thresholds")
    if frame is None or frame.seed.nunique() < _FEWEST:
        return None
    cut = frame[(frame.rule == "highest go") & (frame.target <= 0.97)]
    runs = cut.groupby(["target", "seed"])[["before", "after", "zeros"]].sum().reset_index()
    runs = runs.assign(removed=1 - runs.after / runs.before, zero=runs.zeros / runs.before)
    removed = pu.statistics.summary(runs, by="target", value="removed").set_index("target")
    asked = " as for ".join(percent(target, 0) for target in removed.index)
    same = removed["mean"].nunique() == 1
    told = (
        interval(removed.iloc[0], "{:.2f}")
        if same
        else " and ".join(interval(r, "{:.2f}") for _, r in removed.iterrows())
    )
    return (
        f"**A threshold cannot divide ties.** Asked for {asked}, the published GraSP rule removes {told} of the "
        f"weights of an untrained ResNet-10, because {percent(runs.zero.mean())} of the scores are exactly zero "
        f"({frame.seed.nunique()} seeds, {on(frame)})."
    )


@finding("filter_pruning")
def filters_against_random() -> str | None:
    """How many measures of a filter's importance beat chance, at equal work."""
    frame = recorded("filter_pruning")
    if frame is None:
        return None
    runs = studies.removed_runs(frame)
    runs = studies.with_every_measure(runs[(runs.rounds == 0) & (runs.state == "fine-tuned")])
    at_ratios = studies.against_random(runs[runs["of"] == "macs"])
    runs = runs[runs.ratio == 0.5]
    if "macs" not in set(runs["of"]):
        return None
    rows = studies.against_random(runs)
    rows = rows[rows["of"] == "macs"].sort_values("difference")
    better, worse = (rows[rows.differs & (rows.larger == (rows.a if up else rows.b))] for up in (True, False))
    worst, best = rows.iloc[0], rows.iloc[-1]
    also = studies.against_random(runs)
    also = also[also["of"] == "filters"]
    filters = (
        f"With equally many filters, {(also.larger == also.a).sum()} of {len(also)} beat it. " if len(also) else ""
    )
    return (
        "**Not every measure of a filter's importance beats chance.** With half of the multiply-accumulates of a "
        f"ResNet-20 removed and a short fine-tuning, {len(better)} of {len(rows)} measures beat "
        f"removing filters at random, and {len(worse)} lose to it: `{best.a}` minus random is {points(best)}, "
        f"`{worst.a}` minus random {points(worst)}. {filters}"
        f"{_turning(at_ratios)}(one network, {runs.seed.nunique()} orders, {on(runs)})."
    )


def _turning(rows) -> str:
    """Name the measures whose verdict turns between the lowest and the highest ratio."""
    few, many = (rows[rows.ratio == end].set_index("a") for end in (rows.ratio.min(), rows.ratio.max()))
    turned = [a for a in few.index if few.larger[a] == a and many.larger[a] == "random"]
    if not turned:
        return ""
    low, high = (percent(rows.ratio.agg(end), 0) for end in ("min", "max"))
    which = " and ".join(f"`{a}`" for a in turned)
    return f"With {low} of the multiply-accumulates removed, {which} beat it, and with {high} they lose to it "


@finding("grasp_threshold_debug")
def batches_disagree() -> str | None:
    """How much two batches agree on GraSP's highest scores."""
    frame = recorded("grasp_agreement")
    if frame is None or frame.seed.nunique() < _FEWEST:
        return None
    (row,) = pu.statistics.summary(frame.assign(all="all"), by="all", value="overlap").to_dict("records")
    return (
        "**GraSP depends on its batch.** Of the 5 % of weights that score highest on one batch, another batch of the "
        f"same size has {interval(row, '{:.0f}')} among its own highest ({frame.seed.nunique()} seeds, {on(frame)})."
    )


@finding("evaluation_mode")
def statistics_of_the_batch() -> str | None:
    """What a forgotten `model.eval()` costs."""
    frame = recorded("evaluation_mode")
    if frame is None:
        return None
    cells = frame[(frame.network == "resnet56") & (frame.normalisation == "as trained")]
    batch = cells[(cells["mode"] == "batch") & cells.order.notna()]
    by_class = cells[(cells["mode"] == "batch") & cells.order.isna()]
    running = cells[cells["mode"] == "running"]
    if len(batch) < _FEWEST or running.empty or by_class.empty:
        return None
    lost = batch.assign(all="all", lost=running.accuracy.iloc[0] - batch.accuracy)
    (row,) = pu.statistics.summary(lost, by="all", value="lost").to_dict("records")
    points = interval(row).replace(" %", " points")
    return (
        f"**`model.eval()` matters.** A public ResNet-56 has {percent(running.accuracy.iloc[0])} in evaluation mode. "
        f"With the statistics of shuffled batches it loses {points}, and with batches in the order of an image folder "
        f"{percent(by_class.accuracy.iloc[0])} is left ({len(batch)} orders, {on(frame)})."
    )


@finding("vgg16_at_initialization")
def weights_are_not_work() -> str | None:
    """The work left by each criterion at the same number of weights."""
    frame = recorded("vgg16_at_initialization")
    if frame is None or frame.seed.nunique() < _FEWEST:
        return None
    work = studies.work_left(frame)
    work = work[(work.iterations == 1) & (work.compression == 1) & work.criterion.isin(["snip", "synflow", "random"])]
    rows = pu.statistics.summary(work, by="criterion", value="mac_density").sort_values("mean")
    names = {"random": "random pruning", "snip": "SNIP", "synflow": "SynFlow in one step"}
    told = ", ".join(f"{interval(row)} after {names[row.criterion]}" for _, row in rows.iterrows())
    return (
        "**Equal sparsity is not equal work.** With 10 % of its weights, VGG-16 keeps a very different share of its "
        f"multiply-accumulates: {told} ({frame.seed.nunique()} seeds, {on(frame)})."
    )


@finding("vgg16_at_initialization")
def synflow_wants_iterations() -> str | None:
    """What one step of SynFlow empties."""
    frame = recorded("vgg16_at_initialization")
    if frame is None:
        return None
    flow = frame[(frame.criterion == "synflow") & (frame.compression == 2)]
    empty = flow[flow.iterations == 1].groupby("seed").kept.agg(lambda kept: int((kept == 0).sum()))
    several = flow[flow.iterations > 1]
    if len(empty) < _FEWEST or several.empty:
        return None
    spread = f"{empty.min()} to {empty.max()}" if empty.nunique() > 1 else f"{empty.min()}"
    return (
        f"**SynFlow needs its iterations.** One step down to 1 % of VGG-16's weights empties {spread} of "
        f"{flow.layer.nunique()} layers in each of {len(empty)} seeds. {several.iterations.iloc[0]} steps leave at "
        f"least {several.kept.min():,} weights in every layer."
    )


def points(row: pd.Series) -> str:
    """Write a difference of `statistics.compare` with its interval: +7.0 points [+6.2, +7.8]."""
    return f"{100 * row.difference:+.1f} points [{100 * row.low:+.1f}, {100 * row.high:+.1f}]"


def percent(fraction: float, decimals: int = 1) -> str:
    """Write a fraction as README does: 83.2 %."""
    return f"{100 * fraction:.{decimals}f} %"


def on(frame: pd.DataFrame) -> str:
    """Name the data."""
    names = (studies.in_full(name) for name in sorted(set(frame.data.dropna())))
    return ", ".join(names).replace("(JPEG)", "as JPEG images")


def found(n: int = 5) -> str:
    """Return the list for README."""
    sentences = []
    for notebook, sentence in FINDINGS:
        told = sentence()
        if told and len(sentences) < n:
            sentences.append(f"{len(sentences) + 1}. {told} [{notebook}](notebooks/{notebook}.ipynb)\n")
    return (
        "".join(sentences)
        + "\nBrackets hold 95 % intervals, each by itself. Verdicts are corrected for the number of comparisons "
        "(Holm).\n"
    )


def written(text: str) -> str:
    """Return README with the list put in."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + found() + "\n" + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(written(path.read_text()))
    recordings.PAGE.write_text(recordings.page())
    print(found(), file=sys.stdout)
