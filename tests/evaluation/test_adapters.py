"""Foreign networks as a Backbone: torchvision's ViTs, and whatever a file of the user's returns."""

import pytest
import torch
from torchvision.models.vision_transformer import VisionTransformer

from evaluation.adapters import CallableBackbone, TorchvisionBackbone, encoder_from_file
from evaluation.nets import make_net
from tests.evaluation.backbones import BACKBONES, IMAGE_SIZE, make
from utils.errors import UserError
from vit.backbone import Backbone

IMAGES = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))


def test_torchvision_features_are_the_nets_own():
    """The head on the last class token gives torchvision's own logits."""
    net = make(BACKBONES["torchvision"])
    assert isinstance(net, Backbone) and isinstance(net.net, VisionTransformer)
    torch.nn.init.normal_(net.net.heads.head.weight)
    with torch.no_grad():
        first, last = net.features(IMAGES, layers=(0, -1))
        assert torch.allclose(net(IMAGES), net.net(IMAGES), atol=1e-5)
    assert last.patches.shape == (2, 4, 4, net.embed_dim)
    assert not torch.allclose(first.cls, last.cls)


def test_torchvision_takes_other_sizes_and_oblong_images():
    """Positions are resampled, and left as they are on their own grid."""
    net = make(BACKBONES["torchvision"])
    assert net.features(torch.zeros(1, 3, 48, 64))[0].patches.shape[1:3] == (6, 8)
    assert net(torch.zeros(1, 3, 48, 64)).shape == (1, 1000)


def test_torchvision_positions_keep_their_places_on_an_oblong_grid():
    """Channel 0 tells the row and channel 1 the column, from 0 at one edge to 1 at the other."""
    net, seen = make(BACKBONES["torchvision"]), []
    line = torch.linspace(0, 1, 4)
    with torch.no_grad():
        net.net.conv_proj.weight.zero_(), net.net.conv_proj.bias.zero_()
        grid = net.net.encoder.pos_embedding[0, 1:].view(4, 4, -1)
        grid[..., 0], grid[..., 1] = line[:, None], line[None]
        net.net.encoder.dropout.register_forward_hook(lambda _, args, __: seen.append(args[0]))
        net.features(torch.zeros(1, 3, 48, 64))
    found = seen[0][0, 1:].view(6, 8, -1)
    assert (found[1:, :, 0] > found[:-1, :, 0]).all() and (found[:, 1:, 1] > found[:, :-1, 1]).all()
    assert found[..., 0].std(1).max() < 1e-5 and found[..., 1].std(0).max() < 1e-5


def test_torchvision_weights_load_strictly(tmp_path):
    node = BACKBONES["torchvision"]
    net = make(node, seed=1)
    torch.save(net.net.state_dict(), tmp_path / "w.pth")
    found = make_net(node, str(tmp_path / "w.pth"), seed=2)
    assert torch.equal(found.net.class_token, net.net.class_token)
    torch.save({"class_token": net.net.class_token}, tmp_path / "part.pth")
    with pytest.raises(UserError, match="missing"):
        make_net(node, str(tmp_path / "part.pth"))


def test_unknown_torchvision_model():
    with pytest.raises(ValueError, match=r"no ViT 'vit_x'; known: vit_b_16, .*vit_h_14"):
        TorchvisionBackbone("vit_x")
    with pytest.raises(ValueError, match="weights=NO_SUCH are of vit_b_16 .* leave out either"):
        TorchvisionBackbone("vit_b_16", weights="NO_SUCH", num_layers=1)


CAPI = """
import torch
class Encoder(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, width, 8, 8)
    def forward(self, x):
        maps = self.patches(x).permute(0, 2, 3, 1)
        return maps.mean(dim=(1, 2)), None, maps
def __model_loader__(width=12):
    return Encoder(width)
"""


def test_encoder_from_a_file(tmp_path):
    """capi's contract; width and patch size are found out by asking."""
    (tmp_path / "mine.py").write_text(CAPI)
    net = encoder_from_file(str(tmp_path / "mine.py"), arguments={"width": 20})
    assert (net.embed_dim, net.patch_size) == (20, 8)
    (found,) = net.features(IMAGES)
    assert found.cls.shape == (2, 20) and found.patches.shape == (2, 4, 4, 20)
    with pytest.raises(UserError, match="gives its last one only"):
        net.features(IMAGES, layers=(-2, -1))
    with pytest.raises(UserError, match="unexpected keyword argument 'wide'"):
        encoder_from_file(str(tmp_path / "mine.py"), arguments={"wide": 1})
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="defines no function __model_loader__"):
        encoder_from_file(str(tmp_path / "empty.py"))
    with pytest.raises(UserError, match="no such file"):
        encoder_from_file(str(tmp_path / "gone.py"))


def test_any_function_of_images():
    net = CallableBackbone(lambda x: x.flatten(1), embed_dim=3 * IMAGE_SIZE**2, patch_size=1)
    (found,) = net.features(IMAGES)
    assert found.patches is None and found.cls.shape == (2, net.embed_dim)
    wrong = CallableBackbone(lambda x: x, embed_dim=1, patch_size=1)
    with pytest.raises(UserError, match=r"must return .*got \[2, 3, 32, 32\]"):
        wrong.features(IMAGES)


def test_dinov2_style_encoders_give_other_blocks():
    """get_intermediate_layers is asked for by index and answers in the order of the blocks."""
    ours = make({**BACKBONES["octic"], "_target_": "vit.models.dinov2_vit_small_patch16"})
    net = CallableBackbone(ours, embed_dim=ours.embed_dim, patch_size=ours.patch_size)
    with torch.no_grad():
        for mine, theirs in zip(
            net.features(IMAGES, (-1, 0)), ours.features(IMAGES, (-1, 0)), strict=True
        ):
            assert torch.allclose(mine.cls, theirs.cls) and torch.allclose(
                mine.patches, theirs.patches
            )
