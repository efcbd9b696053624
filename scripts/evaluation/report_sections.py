"""The parts of the page that compare runs: heading, videos, fidelity, mask, and the map of heads."""

from collections.abc import Callable, Iterator
from typing import Any
from xml.etree.ElementTree import Element

from scripts.evaluation import report_words as words
from scripts.evaluation.report_forms import number
from scripts.evaluation.report_html import (
    Child,
    definitions,
    details,
    figures,
    measured,
    node,
    percent,
    section,
    table,
    unit,
)
from scripts.evaluation.report_runs import MADE_BY, Run

METRICS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "recall": "Recall", "mse": "Output MSE"}
EQUAL = 0.999999  # the SSIM from which on a PSNR of null is that of equal videos, infinity
WORDS = {
    "evaluation": "an evaluation",
    "analysis": "an analysis of attention",
    "cost": "a table of costs",
    "ablation": "an ablation",
    "generation": "a generated video",
}


def of_kind(runs: list[Run], kind: str) -> list[Run]:
    """The runs of one kind, in their order."""
    return [run for run in runs if run.kind == kind]


def heading(runs: list[Run]) -> Element:
    """Name of the page, what it reports on, and the figures of the first setting that was compared."""
    days = sorted({run.content["made"] for run in runs if run.content["made"]})
    counts = {kind: len(of_kind(runs, kind)) for kind in WORDS}
    parts = [
        WORDS[kind] if n == 1 else f"{n} × {WORDS[kind].split(' ', 1)[1]}" for kind, n in counts.items() if n
    ]
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    made = f", made {days[0]}" if len(days) == 1 else f", made {days[0]} to {days[-1]}" if days else ""
    return node(
        "header",
        node("h1", "Radial Attention"),
        node("p", f"A report of {listed}{made}.", class_="lead"),
        *_facts(runs),
    )


def _facts(runs: list[Run]) -> Iterator[Element]:
    """A line of figures from the first evaluation that compares something."""
    for run in of_kind(runs, "evaluation"):
        content, reference = run.content, run.content["reference"]
        for setting in content["settings"] or []:
            means = (content["means"] or {}).get(setting["name"])
            if means and setting["name"] != reference:
                pairs = [("density", setting["density"])]
                pairs += [(METRICS[key], means.get(key)) for key in ("psnr", "ssim", "recall")]
                pairs += [("seconds a step", setting["seconds_step"])]
                known = [(term, number(value)) for term, value in pairs]
                shown = [(term, measured(value)) for term, value in known if value is not None]
                against = f" against {reference}" if reference else ""
                yield node("p", f"{setting['name']}{against}, means of {run.name}:", class_="aside first")
                yield definitions(shown, "facts")
                return


def contents(sections: list[Element]) -> Element:
    """Links to the parts of the page."""
    links = [node("li", node("a", part[0].text or "", href=f"#{part.get('id')}")) for part in sections]
    return node("nav", node("ul", *links), aria_label="Parts of this page")


def fidelity(runs: list[Run]) -> Element:
    """Means of each setting against the reference, and each video's own numbers."""
    found: list[Child] = [
        node(
            "p",
            words.FIDELITY,
            class_="aside",
        )
    ]
    for run in runs:
        found.append(node("h3", run.name) if len(runs) > 1 else None)
        found += [_means(run), _equal_videos(run)]
        found += list(_scores(run))
        rows = list(_of_each_video(run))
        if rows:
            columns = ["Prompt", "Seed", "Setting", *list(METRICS.values())[:3]]
            found.append(
                details(f"Each video of {run.name}", table(columns, rows, f"Each video of {run.name}"))
            )
    return section("fidelity", "Fidelity and cost", *found)


def _means(run: Run) -> Element:
    settings = {setting["name"]: setting for setting in run.content["settings"] or []}
    means = run.content["means"] or {}
    names = dict.fromkeys([*settings, *means])
    factor, letter = unit(setting["attention_flops"] for setting in settings.values())
    others = sorted({key for values in means.values() for key in values} - METRICS.keys())
    columns = ["Setting", "Density", "With warm‑up", *METRICS.values(), *others]
    columns += ["Seconds a step", "Seconds a video", f"Attention, {letter}FLOP"]
    rows = []
    for name in names:
        setting, mean = settings.get(name, {}), means.get(name, {})
        given = setting.get
        flops = given("attention_flops")
        reference = " (reference)" if name == run.content["reference"] else None
        options = [node("code", word) for word in given("words") or []]
        rows.append(
            [
                node("span", name, reference, *options, class_="setting"),
                *(measured(given(key)) for key in ("density", "density_with_warmup")),
                *(_metric(key, mean) for key in METRICS),
                *(measured(number(mean.get(key))) for key in others),
                *(measured(given(key)) for key in ("seconds_step", "seconds_video")),
                measured(None if flops is None else flops / factor),
            ]
        )
    return table(columns, rows, f"Settings of {run.name} compared", hidden=True)


def _equal_videos(run: Run) -> Element | None:
    """How many videos have no part in the mean PSNR."""
    videos = [values for video in run.content["videos"] or [] for values in (video["metrics"] or {}).values()]
    count = sum(map(_is_equal, videos))
    text = f"PSNR of {count} equal video{'s' * (count > 1)} is infinite and not in the mean."
    return node("p", text, class_="aside") if count else None


def _is_equal(values: dict[str, Any]) -> bool:
    """Whether these metrics are those of a video equal to its reference."""
    return number(values.get("psnr")) is None and (number(values.get("ssim")) or 0) >= EQUAL


def _metric(key: str, values: dict[str, Any]) -> Element:
    value = number(values.get(key))
    if key == "psnr" and _is_equal(values):
        return node("span", "∞", title="equal videos")
    return measured(value, None if value is None or key != "psnr" else figures(value, 4))


def _scores(run: Run) -> Iterator[Element]:
    """A table for each judge outside: its dimensions, and the score of each setting."""
    scores = run.content["scores"] or {}
    for judge in dict.fromkeys(judge for judges in scores.values() for judge in judges):
        given = {name: judges[judge] for name, judges in scores.items() if judge in judges}
        kinds = dict.fromkeys(kind for values in given.values() for kind in values)
        rows = [[kind, *(measured(number(values.get(kind))) for values in given.values())] for kind in kinds]
        yield table([judge, *given], rows, f"Scores of {judge}")


def _of_each_video(run: Run) -> Iterator[list[Child]]:
    for video in run.content["videos"] or []:
        seed = None if video["seed"] is None else str(video["seed"])
        for name, values in (video["metrics"] or {}).items():
            numbers = [_metric(key, values) for key in list(METRICS)[:3]]
            yield [video["prompt"], seed, node("span", name), *numbers]


def missing(runs: list[Run], have: dict[str, bool], reasons: list[str]) -> Element | None:
    """A sentence for each part that the runs do not hold, with the command that makes it."""
    found = [reason for reason in reasons if reason]
    for part, kind in (
        ("videos", "evaluation"),
        ("fidelity", "evaluation"),
        ("masks", "evaluation"),
        ("recall of layers and heads", "evaluation"),
        ("energy decay", "analysis"),
        ("costs", "cost"),
        ("ablations", "ablation"),
    ):
        if not have[part]:
            found.append(words.MISSING.format(part, MADE_BY[kind]))
    return (
        section("missing", "Not in this report", node("ul", *(node("li", line) for line in found)))
        if found
        else None
    )


def each(runs: list[Run], show: Callable[[Run], list[Child]]) -> list[Child]:
    """What `show` says of each run, with the run's name above where there are several."""
    found: list[Child] = []
    for run in runs:
        found += [node("h3", run.name) if len(runs) > 1 else None, *show(run)]
    return found


def share_bar(share: float | None) -> Element:
    """A share of 1 in percent, with a bar of that length."""
    if share is None:
        return measured(None)
    bar = node("meter", min="0", max="1", value=f"{share:.4f}", aria_hidden="true")
    return node("span", bar, percent(share), class_="bar")
