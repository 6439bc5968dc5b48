"""extras/maps.py: arrays against recomputation without hooks; networks and images of a run; the
command. extras/pictures.py: colours, words and pages."""

import numpy as np
import pytest
import timm
import torch
from helpers import make_run
from PIL import Image
from torch import Tensor, nn

from extras import maps, pictures
from extras.features import plain_batches, read_networks
from runtime import UserError

SMALL = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5,
         "patch_size": 8}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def attention_by_hand(model: nn.Module, images: Tensor, block: int) -> Tensor:
    """Softmax of queries and keys, from the network's parts: mean over heads, (N, T, T)."""
    model.eval()
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for earlier in model.blocks[:block]:
        x = earlier(x)
    attn, y = model.blocks[block].attn, model.blocks[block].norm1(x)
    bias = attn.qkv.bias if attn.qkv.bias is not None else torch.zeros(len(attn.qkv.weight))
    (wq, wk, _), (bq, bk, _) = attn.qkv.weight.chunk(3), bias.chunk(3)
    heads = []
    for h in range(attn.num_heads):
        part = slice(h * attn.head_dim, (h + 1) * attn.head_dim)
        q, k = attn.q_norm(y @ wq[part].T + bq[part]), attn.k_norm(y @ wk[part].T + bk[part])
        scores = torch.exp(q @ k.transpose(1, 2) / attn.head_dim ** 0.5)
        heads.append(scores / scores.sum(-1, keepdim=True))
    return torch.stack(heads).mean(0)


@pytest.mark.parametrize("arch, options", [
    ("vit_tiny_patch16_224", {"qkv_bias": False}),
    ("deit_tiny_distilled_patch16_224", {}),  # two tokens that are no patch
    ("vit_tiny_patch16_224", {"reg_tokens": 3, "qk_norm": True})])
def test_class_attention_is_the_class_tokens_row_on_the_grid_of_patches(arch, options):
    timm.layers.set_fused_attn(True)  # the case that hides the weights
    torch.manual_seed(0)
    model = timm.create_model(arch, **SMALL, **options)
    for p in model.parameters():  # as drawn, attention is almost even, and any map would look right
        nn.init.normal_(p, std=0.5)
    assert model.blocks[2].attn.fused_attn
    expected = attention_by_hand(model, IMAGES, 2)[:, 0, model.num_prefix_tokens:]
    assert expected.max() > 1.3 * expected.min()  # far from even
    found = maps.class_attention(model, IMAGES, 2)
    np.testing.assert_allclose(found, expected.reshape(3, 4, 4), rtol=1e-4, atol=1e-6)
    assert model.blocks[2].attn.fused_attn
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name, options", [
    ("vit_tiny_patch16_224", SMALL | {"class_token": False, "global_pool": "avg"}),
    ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "embed_dim": 12, "num_heads": (1, 2)})])
def test_a_network_without_class_token_says_so(name, options):
    with pytest.raises(UserError, match="no class attention"):
        maps.class_attention(timm.create_model(name, **options), torch.zeros(1, 3, 32, 32))


class Odd(nn.Module):
    """Its second convolution is named first, and runs after an activation that works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = nn.Conv2d(4, 2, 3), nn.Conv2d(3, 4, 3)
        self.cut = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.cut(self.first(x)))


def test_feature_maps_are_the_first_convolutions_in_running_order():
    model = Odd()
    found = maps.feature_maps(model, IMAGES)
    assert list(found) == ["first", "second"] and found["first"].min() < 0
    with torch.no_grad():
        np.testing.assert_array_equal(found["first"], model.first(IMAGES))
    model = timm.create_model("test_efficientnet").train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = maps.feature_maps(model, IMAGES, most=9)
    assert len(found) == 9 and not any("se." in name for name in found)  # of pooled pixels
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_sampled_images_are_test_images_in_the_classes_proportions(scans, scans_run):
    images = maps.tested_images(scans, scans_run, 6)
    assert all(row.path.startswith("test/") for row in images.rows)
    assert [sum(row.labels == (name,) for row in images.rows) for name in "ab"] == [4, 2]
    assert len(maps.tested_images(scans, scans_run / "cnn.pt", 100).rows) == 20


def test_a_larger_image_size_makes_finer_maps(scans_run):
    [network] = read_networks(scans_run / "transformer.pt", torch.device("cpu"), 64).values()
    found = maps.class_attention(network, torch.rand(1, 3, 64, 64))
    assert found.shape == (1, 4, 4) and network.image_size == 64  # 2 x 2 in training


def test_the_command_draws_what_the_arrays_say(scans, scans_run, tmp_path):
    other, out = make_run(tmp_path / "other", scans), tmp_path / "out"
    maps.main(["--weights", str(scans_run), "--weights", str(other), "--out", str(out), "--image",
               str(scans / "test/a/0.png"), "--data", str(scans), "--average", "6"])
    names = {"attention-0", "attention-average", "features-0"}
    assert {file.name for file in out.iterdir()} == {x + y for x in names for y in (".npz", ".png")}
    for name in names:
        with Image.open(out / f"{name}.png") as picture:
            assert 700 < picture.width < 2000 and 300 < picture.height < 2000
            assert len(picture.getcolors(picture.width * picture.height)) > 50
    average = np.load(out / "attention-average.npz")
    file = scans_run / "transformer.pt"
    model = read_networks(scans_run, torch.device("cpu"))[file]
    batches = plain_batches(maps.tested_images(scans, scans_run, 6), model)
    mean = np.concatenate([maps.class_attention(model, batch) for batch in batches]).mean(0)
    np.testing.assert_allclose(average[f"test_vit {file}"], mean / mean.mean(), rtol=1e-4)
    assert len(average) == 2 and len(np.load(out / "features-0.npz")) == 2 * 5


@pytest.mark.parametrize("networks, drawn", [
    ({"cnn": "test_resnet", "transformer": "test_efficientnet"}, "features-0"),  # as in Table 18
    ({"backbone": "test_vit"}, "attention-0")])
def test_only_what_a_network_has_is_drawn_and_beside_the_run(networks, drawn, scans, tmp_path):
    run = make_run(tmp_path / "run", scans, **networks)
    maps.main(["--weights", str(run), "--image", str(scans / "test/a/0.png")])
    assert {file.stem for file in (run / "maps").glob("*.png")} == {drawn}


def test_user_errors_are_one_sentence(scans, scans_run, tmp_path, said):
    image = ["--image", scans / "test/a/0.png"]
    average = ["--data", scans, "--average", 3]
    alone = make_run(tmp_path / "alone", scans, backbone="test_resnet")
    lost = make_run(tmp_path / "lost", scans, backbone="test_vit")
    (lost / "split.csv").unlink()
    for words, weights, *options in (
            ("say what to draw", scans_run), ("--data DIR", scans_run, "--average", 3, *image),
            ("none.png", scans_run, "--image", scans / "none.png"),
            ("in a block 6;", scans_run, *image, "--block", 6),
            ("in a block -1;", scans_run, *image, "--block", -1),
            ("multiple of", scans_run, *image, "--image-size", 40),
            ("no network", alone, *average),
            ("split.csv", lost, *average),
            ("is not there", tmp_path / "gone.pt", *image)):
        assert words in said(maps.main, "--weights", weights, *options)


def test_colours_rise_in_lightness_and_keep_their_places():
    ramp = np.asarray(pictures.paint(np.linspace(3, 5, 256)[None], 3, 5, (256, 1)))[0]
    lightness = ramp @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness[::8]) > 0).all()
    painted = np.asarray(pictures.paint(np.array([[0.0, 1.0], [2.0, np.nan]]), 0, 2, (4, 4)))
    for at, colour in (((0, 0), 0), ((0, 3), 2), ((3, 0), 1), ((3, 3), 0)):
        assert np.abs(painted[at].astype(int) - pictures.RAMP[colour]).max() < 3
    assert np.asarray(pictures.paint(np.ones((2, 2)), 1, 1, (2, 2))).std(axis=(0, 1)).max() == 0


def test_text_stays_within_its_width():
    name = "start of finetune-supervised-brain-mri-0.1\nvit_base_patch16_384.augreg_in21k_ft_in1k"
    wide, narrow = (np.asarray(pictures.words(name, w).convert("L")) < 128 for w in (600, 150))
    assert narrow.shape[1] == 150 and len(narrow) > len(wide)
    assert narrow.sum() == pytest.approx(wide.sum(), rel=0.1)  # nothing lost
    assert not narrow[:, -1].any() and not narrow[-1].any()


def test_a_page_sets_pictures_and_captions_in_columns():
    red, blue = (Image.new("RGB", (60, 40), colour) for colour in ("red", "blue"))
    page = pictures.draw_page("T", "", [["one", red], ["two", blue, "below"]])
    page = np.asarray(page).astype(int)
    reds = np.nonzero(page[..., 0] - page[..., 1:].max(-1) > 200)
    blues = np.nonzero(page[..., 2] - page[..., :2].max(-1) > 200)
    assert len(reds[0]) == len(blues[0]) == 60 * 40
    assert reds[0].min() == blues[0].min() and reds[1].max() < blues[1].min()
