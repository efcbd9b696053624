"""Notes on what of a prompt a model does not get: text beyond a limit of tokens, unknown words."""

import pytest
import transformers

from radial_attn.models.pipeline.families import FAMILIES
from scripts.run.config import read_config
from scripts.run.describe import describe_plan, describe_start
from scripts.run.families import PLAIN_TEMPLATE
from scripts.run.prompt_notes import prompt_notes, texts_of
from tests.support.plans import plan_of
from tests.support.tiny import wan_pipeline
from tests.support.tiny_hunyuan import hunyuan_pipeline

WORDS = "moving on background red green blue yellow white circle square triangle"


def notes(preset: str, *prompts: str, overrides: tuple[str, ...] = ()) -> list[str]:
    config = read_config(f"configs/{preset}.yaml", list(overrides))
    numbered = {0: prompts[0]} if len(prompts) == 1 else dict(enumerate(prompts, 1))
    texts = texts_of(config.generation, config.model.family, numbered)
    plain = config.generation.prompt_template == "plain"
    return prompt_notes(config.model.path, config.model.family, texts, plain=plain)


@pytest.mark.parametrize(
    ("preset", "kept"),
    [
        ("wan_tiny", {"tokenizer": 511}),  # and the mark of the end
        ("wan_i2v_tiny", {"tokenizer": 511}),
        ("mochi_tiny", {"tokenizer": 255}),
        ("hunyuan_tiny", {"tokenizer": 255, "tokenizer_2": 76}),
    ],
)
def test_a_prompt_of_a_bundled_model_is_cut_at_its_limit(preset, kept):
    for name, limit in kept.items():
        words = limit * ["red"]
        whole = [note for note in notes(preset, " ".join(words)) if note.startswith(f"{name} ")]
        assert whole == []
        (note,) = (x for x in notes(preset, " ".join([*words, "blue", "."])) if x.startswith(f"{name} "))
        assert note == f"{name} passes on {limit + 1} tokens; it cuts, from the prompt: 'blue .'"


@pytest.mark.parametrize("build", [wan_pipeline, hunyuan_pipeline])
def test_what_is_cut_is_what_a_pipeline_does_not_pass_on(build, tmp_path):
    """Counts the letters that reach each text encoder; one more is cut, and no letter less."""
    pipeline, seen = build(), []
    pipeline.save_pretrained(tmp_path)
    family = "wan" if build is wan_pipeline else "hunyuan_video"
    names = FAMILIES[family].text
    for name in names:
        getattr(pipeline, name.replace("tokenizer", "text_encoder")).register_forward_pre_hook(
            lambda module, args, options: seen.append(options.get("input_ids") if not args else args[0]),
            with_kwargs=True,
        )
    options = {"max_sequence_length": 512} if build is wan_pipeline else {"prompt_template": PLAIN_TEMPLATE}
    pipeline.encode_prompt(600 * "b", **options)

    def found(text: str) -> list[str]:
        notes = prompt_notes(str(tmp_path), family, {"it": text}, plain=True)
        return [note for note in notes if note.startswith(f"{name} ")]

    for name, ids in zip(names, seen, strict=False):
        passed = getattr(pipeline, name).decode(ids[0]).count("b")
        (note,) = found(passed * "b" + "ccc")
        assert note.endswith("cuts, from it: 'ccc'") and not found(passed * "b")


def test_words_that_a_bundled_model_does_not_know():
    (note,) = notes("wan_tiny", "A cat, walking on the grass!")
    assert note.startswith(
        "the model does not know, in the prompt: cat, walking, the, grass; its words: a moving"
    )
    assert WORDS in note and note.endswith("black navy gray")
    (note,) = notes(
        "mochi_tiny", "a red circle", "a grey dog", "a house", overrides=("generation.negative_prompt=ugly",)
    )
    assert "in line 2 (and 2 more): dog; its words" in note
    assert notes("wan_tiny", "a RED circle moving around on a grey background.") == []


def test_notes_of_a_run_and_of_a_dry_run():
    for dry_run in (True, False):
        plan = plan_of(read_config("configs/wan_tiny.yaml", ["generation.prompt=a cat"]), dry_run=dry_run)
        lines = describe_plan(plan).splitlines() if dry_run else describe_start(plan)
        (line,) = (line for line in lines if "the model does not know, in the prompt: cat" in line)
        assert line.startswith("note")


def test_no_tokenizer_is_read_for_a_short_prompt_or_fetched_in_a_dry_run(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert notes("wan2.1_t2v_14b", 600 * "word ") == []  # its tokenizer is not here
    monkeypatch.setattr(transformers, "AutoTokenizer", None)
    assert notes("wan2.1_t2v_14b", "a cat") == notes("hunyuan_t2v", "a cat") == []
