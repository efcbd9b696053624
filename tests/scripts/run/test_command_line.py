"""The command line of generation: its arguments, and the preset that is taken on cards of several sizes."""

from collections.abc import Callable

import pytest
import torch

from scripts.launch import chosen
from scripts.run import system
from scripts.run.command_line import (
    FULL_PRESET,
    MARGIN,
    SAVING,
    SMALL_PRESET,
    TINY_PRESET,
    Command,
    choose_config,
    choose_preset,
    parse,
)
from scripts.run.config import read_config
from scripts.run.errors import UsageError
from scripts.run.memory import GIB
from scripts.run.preset_needs import memory_needs
from tests.support.plans import plan_of

HUNYUAN, HUNYUAN_TINY = "configs/hunyuan_t2v.yaml", "configs/hunyuan_tiny.yaml"
SAVED = f"with {' '.join(SAVING)}"
Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Pretends that there is a GPU with so many GiB free, and a host."""

    def pretend(card: float, host: float = 128) -> None:
        free = {"cuda": card * GIB, "cpu": host * GIB}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
        monkeypatch.setattr(system, "room", free.__getitem__)

    return pretend


def test_arguments():
    assert parse([TINY_PRESET, "a.b=1", "--dry-run"]) == Command(TINY_PRESET, ["a.b=1"], dry_run=True)
    assert parse(["--help"]).help and parse(["-h"]).help
    longest = f"generation.prompt={300 * 'cat '}"  # more than a file name may have
    assert parse([longest]) == Command(None, [longest])
    with pytest.raises(UsageError, match="unknown option '--sed'"):
        parse(["--sed"])
    with pytest.raises(UsageError, match=r"got 'a\.yaml' and 'b\.yaml'"):
        parse(["a.yaml", "b.yaml"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_bundled_model_is_taken():
    assert choose_preset([]) == (TINY_PRESET, [], "no CUDA device here")


def test_the_last_device_on_the_command_line_counts(machine):
    machine(80)
    arguments = ["model.device=cuda", "model.device=cpu"]
    assert choose_preset(arguments) == (TINY_PRESET, arguments, "model.device=cpu")
    assert choose_preset(arguments[::-1])[0] == FULL_PRESET


@pytest.mark.parametrize(
    ("card", "preset", "more"),
    [
        (2, TINY_PRESET, ()),
        (8, SMALL_PRESET, SAVING),
        *((card, FULL_PRESET, SAVING) for card in (12, 16, 24, 48)),
        (80, FULL_PRESET, ()),
    ],
)
def test_the_step_of_the_ladder_that_a_card_takes(card, preset, more, machine):
    """The reason names the steps before it, and the memory that each would need."""
    machine(card)
    file, overrides, reason = choose_preset([])
    assert (file, overrides) == (preset, list(more))
    before = ["Wan 14B", f"Wan 14B {SAVED}", "Wan 1.3B", f"Wan 1.3B {SAVED}"]
    title = f"{'Wan 14B' if preset == FULL_PRESET else 'Wan 1.3B'}{f' {SAVED}' if more else ''}"
    passed = before[: before.index(title)] if preset != TINY_PRESET else before
    first, *others = reason.split("; ")
    assert [text.split(" would need ")[0] for text in others] == passed
    assert all(text.endswith(" on the GPU") and f" of {card}" in text for text in others)
    assert first.startswith("a card has " if preset == TINY_PRESET else f"{title} needs ")
    assert " on a card" in first or preset == TINY_PRESET


@pytest.mark.parametrize(
    ("card", "preset", "more"),
    [(8, HUNYUAN_TINY, ()), *((card, HUNYUAN, SAVING) for card in (12, 16, 24, 48)), (80, HUNYUAN, ())],
)
def test_another_preset_has_its_own_stand_in(card, preset, more, machine):
    machine(card)
    arguments = [f"--preset={HUNYUAN}", f"--bundled={HUNYUAN_TINY}", "generation.seed=5"]
    file, overrides, reason = choose_config(parse(arguments))
    assert (file, overrides) == (preset, [*more, "generation.seed=5"])
    assert ("hunyuan_t2v would need 5" in reason) == (card < 80)
    assert (f"hunyuan_t2v {SAVED} would need " in reason) == (preset == HUNYUAN_TINY)
    assert reason.endswith(f"; stands in for {HUNYUAN}") == (preset == HUNYUAN_TINY)
    assert read_config(file, overrides).generation.seed == 5


def test_the_processes_say_why_their_launcher_chose():
    arguments = [f"--preset={HUNYUAN}", f"--bundled={HUNYUAN_TINY}", "generation.seed=5", "--dry-run"]
    passed = parse(chosen(arguments))
    assert choose_config(passed) == choose_config(parse(arguments)) and passed.dry_run
    assert chosen([HUNYUAN]) == [HUNYUAN]


def test_a_host_without_room_takes_a_smaller_model(machine):
    """All weights are read into host memory first."""
    machine(80, host=36)
    preset, overrides, reason = choose_preset([])
    assert (preset, overrides) == (SMALL_PRESET, [])
    assert reason.startswith("Wan 1.3B needs ") and reason.count("would need 40 GiB of host memory") == 2
    machine(80, host=8)
    preset, _, reason = choose_preset([])
    assert preset == TINY_PRESET and reason.count("of host memory") == 4
    assert reason.startswith("a card has 80 GiB free; Wan 14B would need 40 GiB of host memory; ")


def test_keys_of_the_user_are_kept(machine):
    machine(24)
    given = ["model.offload=model", "generation.num_frames=33"]
    preset, overrides, _ = choose_preset(given)
    assert (preset, overrides) == (FULL_PRESET, [*SAVING[1:], *given])
    config = read_config(preset, overrides)
    assert (config.model.offload, config.model.quantization) == ("model", "fp8")
    machine(80)
    assert choose_preset(given)[1] == given


@pytest.mark.parametrize(
    ("word", "saving"),
    [
        ("model.quantization=int8", SAVING[2:]),  # such weights do not move block by block
        ("model.compile=blocks", (SAVING[0], SAVING[2])),  # casts from fp8 would break the graph
        ("model.cache=mag", ()),  # which lacks its ratios, and is refused whatever is added
    ],
)
def test_added_keys_work_together_with_the_users_keys(word, saving, machine):
    """On every card the choice can be planned, unless the user's keys are refused."""
    for card in (8, 12, 24, 48):
        machine(card)
        preset, overrides, _ = choose_preset([word])
        assert overrides in ([word], [*saving, word])
        if word != "model.cache=mag":
            plan_of(read_config(preset, overrides), device="cuda")


def test_a_model_of_the_user_has_no_smaller_one(machine, tiny_model):
    machine(4)
    word = "model.path=Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    preset, overrides, reason = choose_preset([word])
    assert (preset, overrides) == (TINY_PRESET, [word]) and "1.3B" not in reason
    with pytest.raises(UsageError, match=r"model\.path: .*hunyuan"):
        choose_config(parse([f"--preset={HUNYUAN}", word]))
    arguments = [f"model.path={tiny_model}", "generation.height=64", "generation.width=64"]
    assert choose_preset(arguments)[:2] == (FULL_PRESET, arguments)


def test_overrides_count_in_what_a_preset_needs(tiny_model, machine):
    def needs(*arguments: str) -> tuple[float, float]:
        return memory_needs(read_config(FULL_PRESET, list(arguments)))

    gpu, host = needs()
    assert gpu > host > 37 * GIB
    smaller, same = needs("generation.num_frames=5", "generation.height=480", "generation.steps=4")
    assert smaller < gpu and same == host  # dense steps beyond 4 are the plan's to refuse
    assert needs(f"model.path={tiny_model}")[1] < GIB
    with pytest.raises(UsageError, match=r"generation\.height: got 5"):
        needs("generation.height=5")
    machine(0.99 * MARGIN * gpu / GIB)
    assert choose_preset([])[1] == list(SAVING)
    machine(1.01 * MARGIN * gpu / GIB)
    assert choose_preset([])[1] == []
    with pytest.raises(UsageError, match=r"generation\.height: got 5"):
        choose_preset(["generation.height=5"])
