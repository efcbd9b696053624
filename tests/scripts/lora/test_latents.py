"""Prepared latents as the trainer reads them: fingerprints, the store, the order of samples."""

import json
import shutil
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest
import torch

from scripts.lora.fingerprint import fingerprint
from scripts.lora.latent_shards import LatentShards
from scripts.lora.latents import BucketSampler, LatentStore, text_key
from scripts.run.config import ROOT
from scripts.run.errors import UsageError

MODEL = ROOT / "assets" / "wan-tiny"
MARK = {"format": "1", "family": "wan", "vae": "v", "text encoder": "t"}
CLIPS = {"a": (4, 3, 2, 2), "b": (4, 2, 2, 4), "c": (4, 3, 2, 2)}  # key and shape
BUCKETS = {(3, 2, 2): [0, 2, 5, 6, 7], (2, 2, 4): [1, 3, 4], (9, 1, 1): [8]}


def latents(key: str) -> torch.Tensor:
    return torch.full(CLIPS[key], float(ord(key)), dtype=torch.bfloat16)


def text(caption: str) -> dict[str, torch.Tensor]:
    mask = torch.arange(5) < len(caption)
    return {"prompt_embeds": torch.full((5, 2), float(len(caption))), "prompt_attention_mask": mask}


def entry(key: str) -> dict:
    frames = 4 * CLIPS[key][1] - 3
    sizes = {"height": 8 * CLIPS[key][2], "width": 8 * CLIPS[key][3]}
    return {"name": f"{key}.mp4", "caption": f"video {key}", "frames": frames, **sizes, "key": key}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of three clips in two shards."""
    shards = LatentShards(tmp_path, "bfloat16", shard_bytes=100)
    shards.begin(MARK, [entry(key) for key in CLIPS])
    shards.add_texts((text_key(caption), text(caption)) for caption in ["", *(f"video {k}" for k in CLIPS)])
    shards.add_latents((key, latents(key)) for key in CLIPS)
    return tmp_path


def test_what_was_written_is_read(folder):
    store = LatentStore.open(folder)
    assert [sample.name for sample in store.samples] == ["a.mp4", "b.mp4", "c.mp4"]
    assert [sample.shard for sample in store.samples] == [f"latents-0000{i}.safetensors" for i in (0, 0, 1)]
    for i, key in enumerate(CLIPS):
        found, words = store.load(i)
        assert found.dtype == torch.bfloat16 and torch.equal(found, latents(key))
        assert store.samples[i].latent_shape == CLIPS[key]
        assert words.keys() == text("").keys()
        assert all(torch.equal(words[name], x) for name, x in text(f"video {key}").items())
        assert words["prompt_attention_mask"].dtype == torch.bool
    assert torch.equal(store.empty_text["prompt_embeds"], torch.zeros(5, 2))


def test_few_files_are_open_at_a_time(folder, monkeypatch):
    monkeypatch.setattr("scripts.lora.latents.OPEN_FILES", 1)
    store = LatentStore.open(folder)
    for i in (0, 2, 1, 0):
        assert torch.equal(store.load(i)[0], latents("abc"[i]))
        assert len(store._files) == 1


@pytest.mark.parametrize("part", MARK)
def test_latents_of_another_model_are_refused_with_what_differs(folder, part):
    store = LatentStore.open(folder)
    store.check(MARK)
    with pytest.raises(UsageError, match=f"another {part} than"):
        store.check(MARK | {part: "other"})


def change(folder: Path, **content: object) -> None:
    file = folder / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | content))


BROKEN = {
    "no index": (
        lambda f: (f / "index.json").unlink(),
        "has no index.json; .*bash scripts/prepare_latents.sh",
    ),
    "no JSON": (lambda f: (f / "index.json").write_text('{"latents": {'), "index.json is not an index"),
    "a list": (lambda f: (f / "index.json").write_text("[]"), "index.json is not an index"),
    "no samples": (
        lambda f: (f / "index.json").write_text('{"fingerprint": {"format": "1"}}'),
        "lacks latents",
    ),
    "another format": (lambda f: change(f, fingerprint=MARK | {"format": "0"}), "format 0, allowed: 1"),
    "a clip is missing": (
        lambda f: change(f, samples=[entry("a"), entry("b") | {"key": "z"}]),
        r"not finished \(1 of 2 clips\)",
    ),
    "a caption is missing": (lambda f: change(f, texts={}), r"not finished \(3 of 3 clips\)"),
    "nothing in it": (lambda f: change(f, samples=[]), r"not finished \(0 of 0 clips\)"),
    "no shard": (lambda f: (f / "latents-00001.safetensors").unlink(), "latents-00001.safetensors cannot be"),
    "a cut shard": (
        lambda f: (f / "text-00000.safetensors").write_bytes(
            (f / "text-00000.safetensors").read_bytes()[:-1]
        ),
        "text-00000.safetensors cannot be read",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_one_line(case, folder):
    damage, words = BROKEN[case]
    damage(folder)
    with pytest.raises(UsageError, match=words) as raised:
        LatentStore.open(folder)
    assert str(raised.value).startswith("data.latents: ") and "\n" not in str(raised.value)


def test_an_epoch_has_every_sample_and_batches_of_one_bucket():
    sampler = BucketSampler(BUCKETS, batch=2, seed=3)
    assert sampler.batches == 3 + 2 + 1
    orders = set()
    for epoch in range(4):
        batches = [sampler.batch_at(epoch * 6 + place) for place in range(6)]
        seen = Counter(i for batch in batches for i in batch)
        assert set(seen) == set(range(9))
        assert seen[8] == 2 and sum(seen[i] for i in BUCKETS[(3, 2, 2)]) == 6  # filled from the beginning
        assert max(seen[i] for i in range(8)) == 2 and sum(seen.values()) == 12
        for batch in batches:
            assert any(set(batch) <= set(members) for members in BUCKETS.values())
        orders.add(tuple(map(tuple, batches)))
    assert len(orders) == 4


def test_the_order_follows_from_seed_and_step_alone():
    first, second = (
        BucketSampler(BUCKETS, 2, seed=1),
        BucketSampler(dict(reversed(BUCKETS.items())), 2, seed=1),
    )
    steps = [13, 0, 40, 7, 13, 1]
    assert [first.batch_at(step) for step in steps] == [second.batch_at(step) for step in steps]
    assert [first.batch_at(step) for step in range(6)] == [[1, 3], [3, 4], [5, 7], [0, 6], [6, 2], [8, 8]]
    other = BucketSampler(BUCKETS, 2, seed=2)
    assert [other.batch_at(step) for step in range(6)] != [first.batch_at(step) for step in range(6)]


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


MODELS = {
    "weights of the VAE": (lambda m: flip_last_byte(m / "vae/diffusion_pytorch_model.safetensors"), {"vae"}),
    "scaling of the VAE": (lambda m: edit(m / "vae/config.json", latents_mean=[0.0] * 16), {"vae"}),
    "version of the VAE": (lambda m: edit(m / "vae/config.json", _diffusers_version="0.1"), set()),
    "size of the text encoder": (
        lambda m: (m / "text_encoder/model.safetensors").open("ab").write(b" "),
        {"text encoder"},
    ),
    "config of the text encoder": (
        lambda m: edit(m / "text_encoder/config.json", num_heads=2),
        {"text encoder"},
    ),
    "version of the text encoder": (
        lambda m: edit(m / "text_encoder/config.json", transformers_version="0"),
        set(),
    ),
    "tokenizer": (lambda m: edit(m / "tokenizer/tokenizer_config.json", extra=1), {"text encoder"}),
    "transformer": (lambda m: edit(m / "transformer/config.json", num_layers=1), set()),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_fingerprint_tells_models_apart_where_it_matters(case, model):
    before = fingerprint(str(model), "wan")
    assert before == fingerprint(str(MODEL), "wan")
    damage, parts = MODELS[case]
    damage(model)
    after = fingerprint(str(model), "wan")
    assert {part for part in before if before[part] != after[part]} == parts


def test_a_broken_model_is_one_line(model):
    (model / "vae" / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"model.path: got .* cannot be read"):
        fingerprint(str(model), "wan")


def test_a_hub_id_in_the_cache_needs_no_network(tmp_path, model, monkeypatch):
    for name, value in {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": True}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    snapshot = repository / "snapshots" / "abc"
    shutil.copytree(model, snapshot)
    shutil.rmtree(snapshot / "transformer")
    assert fingerprint("owner/name", "wan") == fingerprint(str(model), "wan")
    (snapshot / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model.path: got 'owner/name'.* hub"):
        fingerprint("owner/name", "wan")
