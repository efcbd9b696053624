"""Builds the page with Gradio."""

import html
import time
from collections.abc import Iterator
from typing import Any

import gradio as gr

from scripts.run.errors import GenerationError, UsageError, one_line
from scripts.toyworld.render import VOCABULARY, Attributes, parse_caption
from scripts.web.choices import BUNDLED, Models, Request, heads, lengths, selections, usual
from scripts.web.jobs import Jobs, Status
from scripts.web.videos import Studio

TITLE = """# Radial Attention
The same video twice: with dense attention, and with a part of it. Both start from the same noise."""
MEANING = {
    "static": "static: one mask for all heads",
    "dense_step": "dense_step: each head chooses blocks at the first steps, which are dense",
    "profile": "profile: each head has blocks measured before; no dense step",
}
CSS = """
.gradio-container { max-width: 76rem !important; }
#status p { margin: 0.25rem 0; overflow-wrap: anywhere; }
#status progress { width: 100%; height: 0.6rem; accent-color: var(--color-accent); }
#status [role="alert"] { color: #b3261e; font-weight: 600; }
.dark #status [role="alert"] { color: #ffb4ab; }
#player iframe { width: 100%; border: 0; display: block; }
#numbers table { width: auto; }
#numbers :is(th, td) { white-space: nowrap; padding: 0.3rem 0.6rem; }
#numbers td:first-child { white-space: normal; }
#numbers code { overflow-wrap: anywhere; }
#mask { overflow-x: auto; }
#mask img { max-width: none; height: 28rem; background: #fff; }
@media (max-width: 40rem) { #mask img { height: 20rem; } }
"""
SCROLL = "() => document.querySelector('#player').scrollIntoView({ block: 'nearest' })"
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # of the machine


def build(jobs: Jobs, studio: Studio) -> gr.Blocks:
    """Returns the page; `jobs` are served by the caller."""
    with gr.Blocks(title="Radial Attention", analytics_enabled=False) as page:
        gr.Markdown(TITLE)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                inputs = _inputs(studio.models)
                with gr.Row():
                    make = gr.Button("Make videos", variant="primary", min_width=120, elem_id="make")
                    stop = gr.Button("Stop", min_width=120, elem_id="stop")
                status = gr.HTML(elem_id="status")
            with gr.Column(scale=3, min_width=320):
                outputs = [status, gr.HTML(elem_id="player"), gr.Markdown(elem_id="numbers")]
                outputs.append(gr.HTML(elem_id="mask"))

        def run(*values: Any) -> Iterator[tuple[Any, ...]]:
            yield from answers(jobs, studio, Request(*values))

        options = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
        made = make.click(run, inputs, outputs, **options)
        made.success(js=SCROLL, api_visibility="private")
        stop.click(lambda: "<p>Stopped.</p>", None, status, cancels=[made], queue=False)
    return page


def _inputs(models: Models) -> list[Any]:
    """Adds the inputs of a request, in its order, and what changes one by another."""
    first = next(iter(models))
    (frames, preset), *_ = lengths(models, first).items()
    plan = usual(preset, "static")
    model = gr.Dropdown(list(models), value=first, label="Model", elem_id="model")
    length = gr.Radio(list(lengths(models, first)), value=frames, label="Frames", elem_id="frames")
    words, prompt = _prompt(plan.config.generation.prompt)
    way = gr.Radio(_ways(preset), value="static", label="Blocks that are kept", elem_id="selection")
    density = gr.Slider(0.02, 1.0, round(plan.density, 3), step=0.001, label="Density", elem_id="density")
    with gr.Accordion("Seed, layer and head of the mask", open=False):
        seed = gr.Number(plan.config.generation.seed, label="Seed", precision=0, minimum=0, elem_id="seed")
        counts = zip(("Layer", "Head"), heads(plan), strict=True)
        layer, head = (gr.Slider(0, count - 1, 0, step=1, label=name) for name, count in counts)
    asked, suited = [model, length, way], [length, way, density, layer, head]
    quick = {"show_progress": "hidden", "api_visibility": "private"}
    of_model = [*suited, words, prompt]
    model.change(lambda *values: suit_model(models, *values), [model, prompt], of_model, **quick)
    gr.on([length.input, way.input], lambda *values: suit(models, *values), asked, suited, **quick)
    return [model, length, prompt, way, density, seed, layer, head]


def _prompt(text: str) -> tuple[gr.Row, gr.Textbox]:
    """Adds the prompt, and the words of the bundled models, which fill it in."""
    with gr.Group():
        with gr.Row(elem_id="words") as words:
            named = vars(parse_caption(text))
            parts = [
                gr.Dropdown(list(VOCABULARY[name]), value=value, label=name.capitalize(), min_width=150)
                for name, value in named.items()
            ]
        prompt = gr.Textbox(text, label="Prompt", lines=2, max_length=5000, elem_id="prompt")
    quick = {"show_progress": "hidden", "api_visibility": "private"}
    for part in parts:
        part.change(lambda *names: Attributes(*names).caption, parts, prompt, **quick)
    return words, prompt


def suit(models: Models, model: str, frames: int, way: str) -> list[Any]:
    """Returns length, selection, density, layer and head that suit a model; a selection that suits stays.

    Raises gradio.Error, which the page shows, if there is no room for the model.
    """
    presets = lengths(models, model)
    way = way if way in selections(presets[frames]) else "static"
    try:
        plan = usual(presets[frames], way)
    except UsageError as error:
        raise gr.Error(one_line(error), print_exception=False) from error
    layers, count = heads(plan)
    return [
        gr.update(choices=list(presets), value=frames),
        gr.update(choices=_ways(presets[frames]), value=way),
        round(plan.density, 3),
        gr.update(maximum=layers - 1, value=0),
        gr.update(maximum=count - 1, value=0),
    ]


def suit_model(models: Models, model: str, prompt: str) -> list[Any]:
    """Returns what `suit` does for a model's first length, whether words are offered, and a prompt.

    The prompt stays if it is of the kind that suits: a caption of the toy world for a bundled model.
    """
    try:
        parse_caption(prompt)
        is_caption = True
    except ValueError:
        is_caption = False
    frames, preset = next(iter(lengths(models, model).items()))
    suited, bundled = suit(models, model, frames, "static"), model in BUNDLED
    if is_caption != bundled:
        prompt = usual(preset, "static").config.generation.prompt
    return [*suited, gr.update(visible=bundled), prompt]


def _ways(preset: str) -> list[tuple[str, str]]:
    return [(MEANING[name], name) for name in selections(preset)]


def answers(jobs: Jobs, studio: Studio, request: Request) -> Iterator[tuple[Any, ...]]:
    """Yields what the page shows while a request is run and after it: status, player, numbers, mask."""
    began, blank = time.monotonic(), ("", "", "")
    yield "", *blank
    try:
        for state in jobs.run(lambda tell: studio.make(request, tell)):
            if isinstance(state, Status):
                yield working(state, time.monotonic() - began), *(gr.skip(),) * len(blank)
                continue
            frame = f'<iframe title="Both videos" srcdoc="{html.escape(state.player)}"></iframe>'
            frame = f"<p><strong>{html.escape(state.line)}</strong></p>{frame}"
            mask = f'<img src="{state.mask}" alt="The blocks that the mask keeps">'
            line = f'<p role="status">done ({time.monotonic() - began:.0f} s)</p>'
            yield line + noted(state.notes), frame, state.table, mask
    except (UsageError, GenerationError) as error:
        yield wrong(one_line(error)), *blank
    except Exception as error:  # of any kind: the page goes on
        yield wrong(f"{type(error).__name__}: {one_line(error)}"), *blank
        raise


def working(status: Status, seconds: float) -> str:
    """Returns the status of a job, with the seconds since it was asked for."""
    bar = f'<progress value="{status.done}" max="{status.total}"></progress>' if status.total else ""
    return f'<p role="status">{html.escape(status.text)} ({seconds:.0f} s)</p>{bar}{noted(status.notes)}'


def noted(notes: tuple[str, ...]) -> str:
    """Returns a line for each note."""
    return "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)


def wrong(text: str) -> str:
    """Returns one line that says what is wrong."""
    return f'<p role="alert">{html.escape(text)}</p>'
