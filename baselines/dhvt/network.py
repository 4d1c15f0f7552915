"""DHVT: overlapping patch embedding, head tokens, convolutions in the feed-forward; no positions.

Lu et al. 2022. Parameters have the published names, so published weights load unchanged.

Letters in shapes: B images, T tokens, h w grid of patches, D channels.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from baselines.dhvt.layers import DHVTBlock, HeadInteractedAttention
from baselines.dhvt.stem import OverlappingPatchEmbed
from baselines.tapped import TappedTrunk
from utils.ranges import check_counts, check_range, check_word
from vit.initialisation import init_linear
from vit.stochastic_depth import drop_path_rates

DECAYS = ("exempt", "published")
SYNC = ("all", "stem", "none")


class DHVT(TappedTrunk):
    """Dynamic hybrid vision transformer.

    The convolutions of stem and blocks encode positions, so there are no position embeddings, and
    any grid of whole patches works unchanged, oblong ones too.

    patch_size: 2, 4 or 16. decay: `exempt` exempts class token, positions of head tokens and affine
    scales of the stem from weight decay; `published` only the class token (vectors never decay).
    sync_batch_norm: which batch norms take the statistics of all GPUs: `all`; `stem`, as published;
    `none`. representation_size: width of a layer with tanh before the head, or none.

    Departs from DHVT: the feed-forward's batch norms are synchronised too by default, because
    otherwise statistics depend on how the batch is split over GPUs; in_chans has an effect; oblong
    grids are accepted, parts of patches are not; drop_rate acts before the head, not on what
    attention projects; a distillation token, which could not be built, is refused.
    `baselines.dhvt.models` has the plain ViT of apply_dhvt=false.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        representation_size: int | None = None,
        distilled: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        dynamic_img_size: bool = True,
        decay: str = "exempt",
        sync_batch_norm: str = "all",
        attention_backend: str = "auto",
    ) -> None:
        if distilled:
            raise ValueError("DHVT has no distilled form; use distilled=False")
        check_word("decay", decay, DECAYS)
        check_word("sync_batch_norm", sync_batch_norm, SYNC)
        check_counts(1, patch_size=patch_size, num_heads=num_heads)
        check_range("attn_drop_rate", attn_drop_rate, 0, 1, ends="[)")
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=depth,
            class_token=True,
            num_register_tokens=0,
            drop_rate=drop_rate,
            dynamic_img_size=dynamic_img_size,
        )
        self.decay = decay
        self.patch_embed = OverlappingPatchEmbed(patch_size, in_chans, embed_dim)
        self._make_tokens(embed_dim)
        self.blocks = nn.ModuleList(
            DHVTBlock(
                embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                attn_drop=attn_drop_rate,
                norm_eps=norm_eps,
                drop_path_rate=rate,
                attention_backend=attention_backend,
            )
            for rate in drop_path_rates(drop_path_rate, depth, uniform=False)
        )
        self.norm: nn.LayerNorm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.init_weights()
        self._add_pre_logits(representation_size)
        if sync_batch_norm != "none" and _several_gpus():
            asked = self if sync_batch_norm == "all" else self.patch_embed
            nn.SyncBatchNorm.convert_sync_batchnorm(asked)  # in place

    def init_weights(self) -> None:
        """Draw the linear layers, class token and head positions anew; convolutions as torch's."""
        self.apply(init_linear)
        assert self.cls_token is not None
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for part in self.modules():
            if isinstance(part, HeadInteractedAttention):
                nn.init.trunc_normal_(part.pos_embed, std=0.02)

    def patch_positions(self, height: int, width: int) -> Tensor:
        """None are added: a zero for every patch [1 1 1]."""
        assert self.cls_token is not None  # of the dtype and device of the net
        return self.cls_token.new_zeros(1, 1, 1)

    def run(
        self, images: Tensor, taps: Iterable[int] = (), stop: int = -1
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Tokens [B 1+N D] after the blocks, and after those of `taps`."""
        grid, taps, kept = self.grid_of(images), set(taps), {}
        x = self.embed(images)
        last = len(self.blocks) - 1 if stop < 0 else stop
        for index, block in enumerate(self.blocks[: last + 1]):
            x = self._call(block, x, grid)
            if index in taps:
                kept[index] = x
        return x, kept

    def no_weight_decay(self) -> set[str]:
        """Names without weight decay, beside vectors and biases."""
        if self.decay == "published":
            return {"cls_token"}
        return {
            name
            for name, _ in self.named_parameters()
            if name.endswith(("cls_token", "pos_embed")) or "_affine." in name
        }


def _several_gpus() -> bool:
    """Whether it is built in a group of several processes that use GPUs; others cannot share."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return several and torch.cuda.is_initialized()
