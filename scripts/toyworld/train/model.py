"""Holds what the bundled models of all families share: tokenizer, training attention, saving of a model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from radial_attn.models.apply import family_of
from radial_attn.models.training.flow import scaled
from scripts.toyworld.render import VOCABULARY, Scene

CAPTION_SLOTS = 24  # enough for every caption; the rest of a pipeline's text slots is padding
GLUE = ("a", "moving", "on", "background", ",", ".")
STATISTICS = ("latents_mean", "latents_std", "scaling_factor")  # in the configuration of a VAE
CONV_GAIN = 1.8  # of convolutions at the start: makes up for SiLU
LARGEST_LOGIT = 80.0  # its exponential, times all tokens, is a float32
PAD, END = 0, 1  # numbers of <pad> and </s>
T5_SHAPE = {  # a text encoder of two layers, width 64
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "pad_token_id": PAD,
    "eos_token_id": END,
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer with a token for each word of the toy world; other words become <unk>."""
    words = ["<pad>", "</s>", "<unk>", *GLUE, *sum(VOCABULARY.values(), ())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace("grey", "gray")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def plain_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes attention of `[B, S, H, D]` in plain products: compiled, faster than SDPA at few tokens.

    All families normalise queries and keys, so the exponential is safe without subtracting the maximum, and
    the product with the values gives its sum too. `bias` is added to the logits, broadcast to `[B, H, S, S]`.
    """
    query, key, value = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
    logits = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    logits = logits if bias is None else logits + bias
    weights = logits.clamp(max=LARGEST_LOGIT).exp().to(value.dtype)
    mixed, total = (weights @ nn.functional.pad(value, (0, 1), value=1.0)).split([value.shape[-1], 1], -1)
    return (mixed / total).transpose(1, 2)


class TinyDenoiser(nn.Module):
    """Holds text encoders and transformer of one family, which are trained together.

    `forward(latents, sigma, captions)` returns the velocity (noise - video) of `[B, C, F, H, W]` at noise
    levels `[B]`.
    """

    PIPELINE: type[DiffusionPipeline]
    BLOCKS: tuple[str, ...]  # lists of the transformer's blocks, which are compiled
    PARTS: tuple[str, ...] = ("text_encoder", "transformer")  # the trained parts of the pipeline
    PROCESSORS: tuple[type, type]  # of self-attention in training, and in pipelines

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()

    def use_training_attention(self, on: bool) -> None:
        """Switches between the processors of training, equal and faster, and those of pipelines."""
        for layer in family_of(self.transformer).attention_layers(self.transformer):
            layer.processor = self.PROCESSORS[not on]()

    def other_parts(self) -> dict[str, Any]:
        """Returns the arguments of the pipeline class that are not trained, besides VAE and tokenizer."""
        raise NotImplementedError

    def pipeline(self, vae: nn.Module) -> DiffusionPipeline:
        """Makes the pipeline that a user loads, in eval mode, with the processors of pipelines."""
        self.use_training_attention(False)
        parts = {name: getattr(self, name).eval() for name in self.PARTS}
        return self.PIPELINE(vae=vae.eval(), tokenizer=self.tokenizer, **parts, **self.other_parts())

    def tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Returns token numbers, and which of them are valid (1), `[B, CAPTION_SLOTS]` each."""
        device = next(self.parameters()).device
        batch = self.tokenizer(captions, padding="max_length", max_length=CAPTION_SLOTS, return_tensors="pt")
        return batch.input_ids.to(device), batch.attention_mask.to(device)

    def more_loss(self, captions: list[str], scenes: list[Scene], frames: int, step: int) -> Tensor | float:
        """Returns what a family adds to the flow loss, after `forward` of `scenes` with `frames` frames.

        `step`: frames of a latent frame after the first, which is one frame.
        """
        return 0.0

    def take_over(self, pipeline: DiffusionPipeline) -> None:
        """Loads the weights of a pipeline of the same family."""
        for name in self.PARTS:
            getattr(self, name).load_state_dict(getattr(pipeline, name).state_dict())


def set_channel_statistics(vae: nn.Module, latents: Tensor) -> None:
    """Writes mean and deviation of every channel of `[B, C, F, H, W]` into the VAE's configuration."""
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


def normalise(latents: Tensor, vae: nn.Module) -> Tensor:
    """Scales latents for the transformer, by the configuration of the VAE."""
    return scaled(latents, vae.config)


def take_over_vae(vae: nn.Module, trained: nn.Module) -> nn.Module:
    """Loads the weights and statistics of a trained VAE, but not its path, and returns `vae`."""
    vae.load_state_dict(trained.state_dict())
    known = {name: trained.config[name] for name in STATISTICS if name in trained.config}
    vae.register_to_config(**known)
    return vae


def mean_latents(vae: nn.Module, video: Tensor) -> Tensor:
    """Returns latents `[B, C, F, H, W]`, without noise, of videos `[B, 3, F, H, W]` in [-1, 1]."""
    return vae.encode(video).latent_dist.mean.contiguous()


@dataclass(frozen=True)
class Family:
    """Describes one kind of bundled model to the trainer.

    Attributes:
        build_vae, denoiser: make the untrained parts.
        quieten: makes a VAE start with little noise in its latents.
        encode: from VAE and videos `[B, 3, F, H, W]` in [-1, 1] to latents `[B, C, F, H, W]`.
        set_statistics: writes the scale of latents into the configuration of a VAE.
        normalise: from latents and VAE to latents as the transformer takes them.
        frames, clip_frames, frames_step: frames of a video, of a clip that the VAE learns from, and of a
            latent frame.
        mosaic: whether the VAE learns from mosaics first.
        chunked: whether pipelines decode in chunks that overlap.
        start: the model that training starts from, if any.
        defaults: options of the trainer that differ in this family.
    """

    build_vae: Callable[[], nn.Module]
    denoiser: type[TinyDenoiser]
    quieten: Callable[[nn.Module], None]
    encode: Callable[[nn.Module, Tensor], Tensor] = mean_latents
    set_statistics: Callable[[nn.Module, Tensor], None] = set_channel_statistics
    normalise: Callable[[Tensor, nn.Module], Tensor] = normalise
    frames: int = 33
    clip_frames: int = 9
    frames_step: int = 4
    mosaic: bool = False
    chunked: bool = False
    start: Path | None = None
    defaults: dict[str, int | float] = field(default_factory=dict)


def check_target(folder: Path) -> None:
    """Raises ValueError unless the folder is new, empty, or holds a model."""
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_empty and not (folder / "model_index.json").is_file():
        raise ValueError(f"out must be a new folder or one that holds a model, got {folder}")


def save_pipeline(folder: Path, pipeline: DiffusionPipeline) -> None:
    """Writes a pipeline under a temporary name, then replaces the model at `folder`."""
    check_target(folder)
    pipeline.to(dtype=torch.float16)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        pipeline.save_pretrained(Path(temporary) / "new", safe_serialization=True)
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        (Path(temporary) / "new").rename(folder)
