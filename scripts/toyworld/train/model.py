"""What the bundled models of every family share: words, captions as tokens, and how a model is saved."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import DiffusionPipeline
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from radial_attn.models.training.flow import scaled
from scripts.toyworld.render import VOCABULARY

CAPTION_SLOTS = 24  # enough for every caption; the rest of a pipeline's text slots is padding
GLUE = ("a", "moving", "on", "background", ",", ".")
STATISTICS = ("latents_mean", "latents_std", "scaling_factor")  # in the configuration of a VAE
CONV_GAIN = 1.8  # of convolutions at the start: what SiLU takes away
LARGEST_LOGIT = 80.0  # its exponential, times all tokens, is a float32
PAD, END = 0, 1  # numbers of <pad> and </s>
T5_SHAPE = {  # of a text encoder of two layers, width 64
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
    """One token a word of the toy world; other words become <unk>."""
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
    """Attention of `[B, S, H, D]` in plain products: compiled, faster than SDPA at a few hundred tokens.

    Queries and keys are normalised in every family, so that the exponential needs no maximum taken off and
    no pass over the logits beside the one that makes it; the sum comes with the product by the values.

    `bias`: added to the logits, broadcast to `[B, H, S, S]`.
    """
    query, key, value = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
    logits = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    logits = logits if bias is None else logits + bias
    weights = logits.clamp(max=LARGEST_LOGIT).exp().to(value.dtype)
    mixed, total = (weights @ nn.functional.pad(value, (0, 1), value=1.0)).split([value.shape[-1], 1], -1)
    return (mixed / total).transpose(1, 2)


class TinyDenoiser(nn.Module):
    """Text encoders and transformer of one family, trained together.

    `forward(latents, sigma, captions)`: the velocity (noise - video) of `[B, C, F, H, W]` at levels `[B]`.
    """

    PIPELINE: type[DiffusionPipeline]
    BLOCKS: tuple[str, ...]  # lists of the transformer's blocks, which are compiled
    PARTS: tuple[str, ...]  # what `pipeline` takes over, under the names of the pipeline

    def __init__(self):
        super().__init__()
        self.tokenizer = build_tokenizer()

    def use_training_attention(self, on: bool) -> None:
        """Switches between the processors of training, equal and faster, and those of pipelines."""
        raise NotImplementedError

    def pipeline(self, vae: nn.Module) -> DiffusionPipeline:
        """All that a user needs, in eval mode, with the processors of pipelines."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """The blocks of the transformer in order."""
        return [block for name in self.BLOCKS for block in getattr(self.transformer, name)]

    def tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Token numbers and which of them are valid (1), `[B, CAPTION_SLOTS]` each."""
        device = next(self.parameters()).device
        found = self.tokenizer(captions, padding="max_length", max_length=CAPTION_SLOTS, return_tensors="pt")
        return found.input_ids.to(device), found.attention_mask.to(device)

    def caption_loss(self, captions: list[str]) -> Tensor | float:
        """What keeps the words of captions apart, added to the loss of the velocity: nothing."""
        return 0.0

    def take_over(self, pipeline: DiffusionPipeline) -> None:
        """Weights of a pipeline of the same family."""
        for name in self.PARTS:
            getattr(self, name).load_state_dict(getattr(pipeline, name).state_dict())


@dataclass(frozen=True)
class Family:
    """One kind of bundled model, as the trainer takes it.

    Attributes:
        build_vae, denoiser: make the parts, untrained; `denoiser` is a class under `TinyDenoiser`.
        quieten: makes a VAE start with little noise in its latents.
        encode: latents `[B, C, F, H, W]` of videos `[B, 3, frames, height, width]` in [-1, 1].
        set_statistics: writes what latents are normalised with into the configuration of a VAE.
        normalise: latents and their VAE to latents as the transformer takes them.
        frames, clip_frames, frames_step: of a video, of what the VAE learns from, to a latent frame.
        mosaic: whether the VAE learns from mosaics first.
        chunked: whether pipelines decode in chunks that overlap.
        start: the model that training goes on from; None: from nothing.
        defaults: options of the trainer that are the family's own.
    """

    build_vae: Callable[[], nn.Module]
    denoiser: Callable[[], TinyDenoiser]
    quieten: Callable[[nn.Module], None]
    encode: Callable[[nn.Module, Tensor], Tensor]
    set_statistics: Callable[[nn.Module, Tensor], None]
    normalise: Callable[[Tensor, nn.Module], Tensor]
    frames: int = 33
    clip_frames: int = 9
    frames_step: int = 4
    mosaic: bool = False
    chunked: bool = False
    start: Path | None = None
    defaults: dict[str, int | float] = field(default_factory=dict)


def set_channel_statistics(vae: nn.Module, latents: Tensor) -> None:
    """Mean and standard deviation of every channel of `[B, C, F, H, W]`, into the VAE's configuration."""
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


def normalise(latents: Tensor, vae: nn.Module) -> Tensor:
    """Latents as a transformer takes them, by the configuration of the VAE."""
    return scaled(latents, vae.config)


def take_over_vae(vae: nn.Module, trained: nn.Module) -> nn.Module:
    """`vae` with the weights of a trained one and what its latents are normalised with, but not its path."""
    vae.load_state_dict(trained.state_dict())
    known = {name: trained.config[name] for name in STATISTICS if name in trained.config}
    vae.register_to_config(**known)
    return vae


def mean_latents(vae: nn.Module, video: Tensor) -> Tensor:
    """Latents `[B, C, F, H, W]` of videos `[B, 3, frames, height, width]` in [-1, 1], without noise."""
    return vae.encode(video).latent_dist.mean.contiguous()


def check_target(folder: Path) -> None:
    """Raises ValueError unless a model may be put there: nothing yet, an empty folder, or another model."""
    is_model = (folder / "model_index.json").is_file()
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_model and not is_empty:
        raise ValueError(f"out must be a new folder or one that holds a model, got {folder}")


def save_pipeline(folder: Path, pipeline: DiffusionPipeline, dtype: torch.dtype = torch.float16) -> None:
    """Writes a pipeline to a temporary name, then puts it in place of the model at `folder`."""
    check_target(folder)
    pipeline.to(dtype=dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        pipeline.save_pretrained(Path(temporary) / "new", safe_serialization=True)
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        (Path(temporary) / "new").rename(folder)
