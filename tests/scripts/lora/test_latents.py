"""Prepared latents as the trainer reads them: the store, the order of samples, fingerprints."""

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
    """Makes a folder of three clips in two shards."""
    shards = LatentShards(tmp_path, "bfloat16", shard_bytes=100)
    shards.begin(MARK, [entry(key) for key in CLIPS])
    shards.add_texts((text_key(caption), text(caption)) for caption in ["", *(f"video {k}" for k in CLIPS)])
    shards.add_latents((key, latents(key)) for key in CLIPS)
    return tmp_path


def test_the_store_reads_what_was_written(folder):
    store = LatentStore.open(folder)
    assert [sample.name for sample in store.samples] == ["a.mp4", "b.mp4", "c.mp4"]
    assert [sample.shard for sample in store.samples] == [f"latents-0000{i}.safetensors" for i in (0, 0, 1)]
    for i, key in enumerate(CLIPS):
        video, words = store.load(i)
        assert video.dtype == torch.bfloat16 and torch.equal(video, latents(key))
        assert store.samples[i].latent_shape == CLIPS[key]
        assert words.keys() == text("").keys() and words["prompt_attention_mask"].dtype == torch.bool
        assert all(torch.equal(words[name], x) for name, x in text(f"video {key}").items())
    assert torch.equal(store.empty_text["prompt_embeds"], torch.zeros(5, 2))


def test_few_files_are_open_at_a_time(folder, monkeypatch):
    monkeypatch.setattr("scripts.lora.latents.OPEN_FILES", 1)
    store = LatentStore.open(folder)
    for i in (0, 2, 1, 0):
        assert torch.equal(store.load(i)[0], latents("abc"[i]))
        assert store.file.cache_info().currsize == 1


@pytest.mark.parametrize("part", MARK)
def test_latents_of_another_model_are_refused_by_the_part_that_differs(folder, part):
    store = LatentStore.open(folder)
    store.check(MARK)
    with pytest.raises(UsageError, match=f"another {part} than"):
        store.check(MARK | {part: "other"})


def edit(file: Path, **changes: object) -> None:
    """Changes entries of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut_off(file: Path) -> None:
    """Removes the last byte of a file."""
    file.write_bytes(file.read_bytes()[:-1])


INDEX, CLIP, WORDS = "index.json", "latents-00001.safetensors", "text-00000.safetensors"
OTHER_CLIP = entry("b") | {"key": "z"}
BROKEN = {  # what is done to the folder, and the message
    "no index": (lambda f: (f / INDEX).unlink(), "no index.json; .*scripts/prepare_latents.sh command again"),
    "no JSON": (lambda f: (f / INDEX).write_text('{"latents": {'), "index.json is not an index"),
    "a list": (lambda f: (f / INDEX).write_text("[]"), "index.json is not an index"),
    "no samples": (lambda f: (f / INDEX).write_text('{"fingerprint": {"format": "1"}}'), "lacks latents"),
    "another format": (lambda f: edit(f / INDEX, fingerprint=MARK | {"format": "0"}), "format 0, must be 1"),
    "no clip": (lambda f: edit(f / INDEX, samples=[entry("a"), OTHER_CLIP]), r"unfinished \(1 of 2 clips\)"),
    "no caption": (lambda f: edit(f / INDEX, texts={}), r"unfinished \(3 of 3 clips\)"),
    "empty": (lambda f: edit(f / INDEX, samples=[]), r"unfinished \(0 of 0 clips\)"),
    "no shard": (lambda f: (f / CLIP).unlink(), f"{CLIP} cannot be read"),
    "a cut shard": (lambda f: cut_off(f / WORDS), f"{WORDS} cannot be read"),
    "another shard": (
        lambda f: shutil.copy(f / "latents-00000.safetensors", f / CLIP),
        f"{CLIP} lacks c.mp4",
    ),
    "other texts": (lambda f: shutil.copy(f / CLIP, f / WORDS), f"{WORDS} lacks a caption"),
    "numbers": (lambda f: edit(f / INDEX, texts={text_key(""): 3}), "index.json is not an index"),
    "no entry": (lambda f: edit(f / INDEX, latents={"a": {}}), "index.json is not an index"),
    "another folder": (
        lambda f: edit(f / INDEX, latents={"a": {"shard": "../a.safetensors", "shape": [4, 3, 2, 2]}}),
        "index.json is not an index",
    ),
    "half a pair": (
        lambda f: edit(f / INDEX, samples=[entry("a") | {"caption": "\ud800"}]),
        "index.json is not an index .*half of a surrogate pair",
    ),
    "no name": (lambda f: edit(f / INDEX, samples=[{"key": "a"}]), "index.json is not an index"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_one_line(case, folder):
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(UsageError, match=message) as raised:
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
    first = BucketSampler(BUCKETS, 2, seed=1)
    second = BucketSampler(dict(reversed(BUCKETS.items())), 2, seed=1)
    steps = [13, 0, 40, 7, 13, 1]
    assert [first.batch_at(step) for step in steps] == [second.batch_at(step) for step in steps]
    assert [first.batch_at(step) for step in range(6)] == [[1, 3], [3, 4], [5, 7], [0, 6], [6, 2], [8, 8]]
    other = BucketSampler(BUCKETS, 2, seed=2)
    assert [other.batch_at(step) for step in range(6)] != [first.batch_at(step) for step in range(6)]


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


VAE, TEXT, TOKENIZER = "vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json"
MODELS = {  # what is changed in the model, and the part of the fingerprint that changes
    "weights of the VAE": (lambda m: flip_last_byte(m / "vae/diffusion_pytorch_model.safetensors"), "vae"),
    "scaling of the VAE": (lambda m: edit(m / VAE, latents_mean=[0.0] * 16), "vae"),
    "version of the VAE": (lambda m: edit(m / VAE, _diffusers_version="0.1"), None),
    "size of the text encoder": (lambda m: cut_off(m / "text_encoder/model.safetensors"), "text encoder"),
    "config of the text encoder": (lambda m: edit(m / TEXT, num_heads=2), "text encoder"),
    "version of the text encoder": (lambda m: edit(m / TEXT, transformers_version="0"), None),
    "tokenizer": (lambda m: edit(m / TOKENIZER, extra=1), "text encoder"),
    "transformer": (lambda m: edit(m / "transformer/config.json", num_layers=1), None),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_fingerprint_follows_what_latents_depend_on(case, model):
    before = fingerprint(str(model), "wan")
    assert before == fingerprint(str(MODEL), "wan")
    damage, part = MODELS[case]
    damage(model)
    after = fingerprint(str(model), "wan")
    assert [name for name in before if before[name] != after[name]] == ([part] if part else [])


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
