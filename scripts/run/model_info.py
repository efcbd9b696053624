"""Holds the numbers of a model that decide sizes, FLOPs and memory."""

import math
from dataclasses import dataclass, field

from radial_attn import TokenGrid
from scripts.run.config import VideoSize

SOUND_FRAMES = 24 / 40  # of a token of sound


@dataclass(frozen=True)
class ModelInfo:
    """Holds the shape of a video pipeline.

    Attributes:
        layers: with self-attention over the video, without `control_layers` and `decoder_layers`.
        ffn: hidden width of a feed-forward.
        patch: latent frames, rows and columns of a token; latents: channels that the transformer returns.
        text_tokens: in cross-attention; `joint_text`: in the sequence of self-attention.
        token_macs: multiply-adds of a token in the matrices of a layer.
        rope_length: positions along an axis, None for any number.
        rope_time: channels and base of the rotary embedding in time, None if it is learned.
        vae_base: channels of the VAE's last layers a pixel; `vae_frames`, `vae_pixels`: its compression.
        vae_copies: float32 tensors of `vae_base` channels that decoding holds at once, measured.
        vae_chunk: frames that it decodes at once, inf for all, None for all and those that it then drops;
            `vae_stride`: frames from one chunk to the next, if they overlap and tiles are joined chunk by
            chunk; `vae_clip`: frames and latent frames of a chunk if videos are whole chunks and 2 latent
            frames; `vae_tile`: pixels of a tile's side, of which one in `vae_overlap` overlaps.
        pixel_factor: the pipeline takes multiples of it as height and width.
        takes_guidance: False for a HunyuanVideo whose transformer has no guidance built in.
        parameters: the number of weights of each component, empty if unknown; without those of `packed`.
        sound: channels of sound in the sequence of self-attention, 40 tokens a second of 24 frames.
        shortest: frames of a video at least.
        packed: bytes of weights that stay as a GGUF file holds them, by component.
        control_layers: for each control layer of VACE, the number of the layer that it feeds.
        decoder_layers: after the others, always dense over two copies of the video (MotifVideo).
        controlnet_layers: of a control net beside the transformer, always dense (Cosmos Transfer).
        last_image: "needed" beside the first one, "taken", or "none".
        references: frames of tokens in front of the video, one for each reference image of VACE, and one for
            Wan-Animate's character.
        face: pixels of a side of Wan-Animate's video of a face, 0 for other models.
        held: bytes of videos that stay on the device while others are denoised and decoded.
        further_frames: decoded together with those that are denoised at once.
        frame_times: whether each frame has a time of its own, and so each token modulations of its own.
        target_size: side of a square with the area of the videos that are sized by an image.
        order: of the tokens, see `TokenGrid`.
    """

    layers: int
    heads: int
    head_dim: int
    ffn: int
    patch: tuple[int, int, int] = (1, 2, 2)
    latents: int = 16
    text_tokens: int = 512
    joint_text: int = 0
    token_macs: int = 0
    rope_length: int | None = 1024
    rope_time: tuple[int, float] | None = None
    vae_base: int = 96
    vae_copies: float = 15
    vae_chunk: float | None = 4
    vae_stride: int | None = None
    vae_clip: tuple[int, int] | None = None
    vae_tile: int = 256
    vae_overlap: int = 4
    vae_frames: int = 4
    vae_pixels: int = 8
    pixel_factor: int = 16
    takes_guidance: bool = True
    parameters: dict[str, int] = field(default_factory=dict)
    packed: dict[str, int] = field(default_factory=dict)
    control_layers: tuple[int, ...] = ()
    decoder_layers: int = 0
    controlnet_layers: int = 0
    last_image: str = "none"
    references: int = 0
    sound: int = 0
    shortest: int = 1
    face: int = 0
    held: float = 0.0
    further_frames: int = 0
    frame_times: bool = False
    target_size: int = 0
    order: str = "raster"

    @property
    def vae_step(self) -> int:
        """Returns the pixels from one tile to the next."""
        return self.vae_tile - self.vae_tile // self.vae_overlap

    @property
    def width(self) -> int:
        """Counts the channels of a token."""
        return self.heads * self.head_dim

    @property
    def macs(self) -> int:
        """Counts the multiply-adds of a token in a layer: `token_macs`, or a Wan block's if that is 0."""
        return self.token_macs or 6 * self.width**2 + 2 * self.width * self.ffn

    def attention_layers(self, first: int = 0) -> int:
        """Counts the self-attentions from layer `first` on; a control layer counts as the one it feeds."""
        return self.layers - first + sum(layer >= first for layer in self.control_layers)

    def size_factor(self, axis: int) -> int:
        """Returns the pixels that height (axis 1) or width (axis 2) must be a multiple of."""
        return math.lcm(self.pixel_factor, self.vae_pixels * self.patch[axis])

    @property
    def frames_form(self) -> tuple[int, int]:
        """Returns a and b if a video has a k + b frames."""
        return self.vae_clip or (self.vae_frames, 1)

    def vae_latents(self, frames: int) -> int:
        """Returns the latent frames of a video."""
        if self.vae_clip:
            return frames // self.vae_clip[0] * self.vae_clip[1] + 2
        return (frames - 1) // self.vae_frames + 1

    def latent_frames(self, frames: int) -> int:
        """Returns the tokens in time for this number of video frames."""
        return self.vae_latents(frames) // self.patch[0]

    def grid(self, size: VideoSize) -> TokenGrid:
        """Returns the tokens of the transformer: latent frames and pixels over the patch size, references."""
        return TokenGrid(
            self.latent_frames(size.frames) + self.references,
            size.height // self.vae_pixels // self.patch[1],
            size.width // self.vae_pixels // self.patch[2],
            self.joint_text + self.sound * round(size.frames / SOUND_FRAMES),
            self.order,
        )
