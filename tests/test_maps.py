"""Maps of networks against recomputation by hand, their sampling of images, and the pictures of the command."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import put, sentence
from PIL import Image
from torch import Tensor, nn

from data import read_images, split_images, write_split
from extras import maps, pictures
from metrics import MinibatchCKA
from runtime import Run, UserError, build_model

SMALL = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
TRANSFORMERS = {
    "vit": ("vit_tiny_patch16_224", SMALL | {"patch_size": 8, "qkv_bias": False}),
    "deit": ("deit_tiny_distilled_patch16_224", SMALL | {"patch_size": 8}),  # two tokens that are no patch
    "norms and registers": ("vit_tiny_patch16_224", SMALL | {"patch_size": 8, "reg_tokens": 3, "qk_norm": True}),
}


@pytest.fixture(params=TRANSFORMERS)
def transformer(request: pytest.FixtureRequest) -> nn.Module:
    name, options = TRANSFORMERS[request.param]
    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    for p in model.parameters():  # as drawn, attention is almost even, and any map would look right
        nn.init.normal_(p, std=0.5)
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def weights_by_hand(model: nn.Module, images: Tensor, block: int) -> Tensor:
    """Softmax of queries and keys, from the network's parts and without hooks: (N, heads, T, T)."""
    with torch.no_grad():
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
        return torch.stack(heads, 1)


# %% attention


def test_attention_agrees_with_a_recomputation_without_hooks(transformer: nn.Module, images: Tensor) -> None:
    assert transformer.blocks[0].attn.fused_attn  # the case that hides the weights
    found = maps.attention_weights(transformer, images, [2, 0])
    for weights, block in zip(found, (2, 0), strict=True):
        by_hand = weights_by_hand(transformer, images, block)
        assert by_hand.max() > 1.3 * by_hand.min()  # far from even
        torch.testing.assert_close(weights, by_hand.mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))


def test_class_attention_is_the_class_tokens_row_on_the_grid_of_patches(transformer: nn.Module, images: Tensor) -> None:
    by_hand = weights_by_hand(transformer, images, 1).mean(1)
    before = transformer.num_prefix_tokens
    found = maps.class_attention(transformer, images, block=1)
    assert isinstance(found, np.ndarray) and found.shape == (3, 4, 4)
    np.testing.assert_allclose(found[2, 1, 3], by_hand[2, 0, before + 1 * 4 + 3], rtol=1e-4)
    np.testing.assert_allclose(found.sum((1, 2)), 1 - by_hand[:, 0, :before].sum(-1), rtol=1e-4)


def test_rollout_is_the_product_of_half_attention_and_half_skip(transformer: nn.Module, images: Tensor) -> None:
    one = np.eye(16 + transformer.num_prefix_tokens)
    first, second, third = (np.asarray(weights_by_hand(transformer, images, b).mean(1)) / 2 + one / 2 for b in range(3))
    product = third @ second @ first
    found = maps.rollout(maps.attention_weights(transformer, images))
    np.testing.assert_allclose(found, product, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    row = product[:, 0, transformer.num_prefix_tokens:].reshape(3, 4, 4)
    np.testing.assert_allclose(maps.attention_rollout(transformer, images), row, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name, options", [
    ("test_resnet", {}), ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "embed_dim": 12, "num_heads": (1, 2)}),
    ("vit_tiny_patch16_224", SMALL | {"patch_size": 8, "class_token": False, "global_pool": "avg"})])
def test_a_network_without_class_token_says_so(name: str, options: dict) -> None:
    model = timm.create_model(name, **options)
    for look in (maps.class_attention, maps.attention_rollout):
        with pytest.raises(UserError, match=f"{name} has no class token"):
            look(model, torch.zeros(1, 3, 32, 32))


def test_attention_of_another_kind_and_missing_blocks_are_refused(images: Tensor) -> None:
    relative = timm.create_model("beit_base_patch16_224", **SMALL, patch_size=8)
    with pytest.raises(UserError, match="another kind"):
        maps.class_attention(relative, images)
    vit = timm.create_model("vit_tiny_patch16_224", **SMALL, patch_size=8)
    for block in (3, -1):
        with pytest.raises(UserError, match="blocks 0 to 2"):
            maps.class_attention(vit, images, block)


# %% feature maps


def test_feature_maps_are_the_outputs_of_the_first_five_convolutions(images: Tensor) -> None:
    model = timm.create_model("test_resnet").train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = maps.feature_maps(model, images)
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())  # batch norm's too
    expected = []
    for module in model.eval().modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda layer, inputs, output: expected.append(output.detach().clone()))
    model(images)
    assert len(found) == 5 and len(expected) > 5
    for (name, values), output in zip(found.items(), expected):
        assert isinstance(model.get_submodule(name), nn.Conv2d)
        np.testing.assert_array_equal(values, output)


def test_feature_maps_come_in_running_order_and_before_an_activation_in_place(images: Tensor) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first, self.cut = nn.Conv2d(4, 2, 3), nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.cut(self.first(x)))

    found = maps.feature_maps(Odd(), images)
    assert list(found) == ["first", "second"] and found["first"].min() < 0
    assert list(maps.feature_maps(Odd(), images, layers=1)) == ["first"]


def test_convolutions_on_one_pooled_pixel_are_no_maps(images: Tensor) -> None:
    found = maps.feature_maps(timm.create_model("efficientnet_b0"), images[:1])
    assert len(found) == 5 and not any("se." in name for name in found)


# %% CKA


class Layers(nn.Module):
    """Two layers of 8 features; what they give can be turned by `turn` (8, 8)."""
    feature_info = [{"module": "a"}, {"module": "b"}, {"module": "gone"}]

    def __init__(self, turn: Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(27, 8, bias=False), nn.Linear(8, 8, bias=False)
        draw = torch.Generator().manual_seed(2)
        a, b = torch.randn(8, 27, generator=draw), torch.randn(8, 8, generator=draw)
        self.a.weight.data, self.b.weight.data = turn @ a, turn @ b @ turn.T

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.flatten(1)))


def test_cka_of_a_representation_with_a_rotation_of_itself_is_one() -> None:
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3))).Q
    draw = torch.Generator().manual_seed(4)
    loader = [torch.randn(12, 3, 3, 3, generator=draw) for _ in range(4)]
    matrix = maps.cka_matrix(Layers(torch.eye(8)), Layers(rotation), loader)
    assert matrix.shape == (3, 3)  # a, b and the output
    np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-4)
    assert matrix[0, 1] < 0.95
    labelled = [(batch, torch.zeros(12)) for batch in loader]
    with_labels = maps.cka_matrix(Layers(torch.eye(8)), Layers(rotation), labelled)
    np.testing.assert_array_equal(matrix, with_labels)
    with pytest.raises(ValueError, match="at least 4"):
        maps.cka_matrix(Layers(torch.eye(8)), Layers(rotation), [loader[0][:3]])


def test_cka_of_small_copies_is_that_of_the_layers_themselves(images: Tensor) -> None:
    cnn, vit = timm.create_model("test_resnet"), timm.create_model("test_vit", img_size=32)
    loader = [torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    layers = [maps.cka_layers(arm) for arm in (cnn, vit)]
    assert list(layers[0]) == ["act1", "layer1.0", "layer2.0", "layer3.0", "layer4.0", "output"]
    assert list(layers[1]) == [*(f"blocks.{i}" for i in range(6)), "output"]
    whole = MinibatchCKA(6, 7)
    for batch in loader:
        found = [maps.watch(arm, batch, wanted, lambda name, output: output.detach().clone())
                 for arm, wanted in zip((cnn, vit), layers)]
        whole.add(*([features[name] for name in wanted] for features, wanted in zip(found, layers)))
    np.testing.assert_allclose(maps.cka_matrix(cnn, vit, loader), whole.matrix(), atol=1e-3)
    assert maps.small_copy("", torch.randn(6, 3, 5, 5)).shape == (6, 6)


# %% the command


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [f"{part}/{name}/{i}.png" for part, name, n in (("train", "a", 12), ("train", "b", 12), ("test", "a", 8),
                                                            ("test", "b", 4)) for i in range(n)]
    return put(tmp_path_factory.mktemp("data") / "scans", *names)


def make_run(folder: Path, data: Path, *, seed: int = 3, weights: Path | None = None, **networks: str) -> Path:
    """A run folder with networks that have moved away from their start."""
    images = split_images(read_images(data))
    run = Run(folder, {"init": "random", "seed": seed, "weights": weights, "resume": False, "overwrite": False})
    run.begin(classes=images.classes, multi_label=False)
    write_split(folder / "split.csv", images)
    for name, arch in (networks or {"cnn": "test_resnet", "transformer": "test_vit"}).items():
        model = build_model(arch, "random", 32, outputs=4, seed=seed)
        for p in model.parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        run.save_network(f"{name}.pt", model, arch)
    run.finish()
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "cass-scans", data)


def test_sampled_images_are_test_images_in_the_classes_proportions(data: Path, run: Path, tmp_path: Path) -> None:
    rows, what = maps.sample_rows(data, [run], 6)
    assert all(row.split == "test" and row.path.startswith("test/") for row in rows)
    assert [sum(row.labels == (name,) for row in rows) for name in "ab"] == [4, 2]
    assert "6 test images of scans (4 a, 2 b)" in what
    assert len(maps.sample_rows(data, [run], 100)[0]) == 12
    other = make_run(tmp_path / "other", data)
    lines = (other / "split.csv").read_text().splitlines()  # here, most of them were trained on
    lines = [line.replace(",test,", ",train,") if line.startswith("test/a") else line for line in lines]
    (other / "split.csv").write_text("\n".join(lines))
    shared, _ = maps.sample_rows(data, [run, other], 100)
    assert sorted(row.path for row in shared) == [f"test/b/{i}.png" for i in range(4)]


def test_start_weights_are_those_of_the_runs_seed_and_of_pretraining(data: Path, run: Path, tmp_path: Path) -> None:
    once = make_run(tmp_path / "once", data, seed=9, weights=run)
    tuned = make_run(tmp_path / "tuned", data, seed=9, weights=once / "transformer.pt", transformer="test_vit")
    start, trained = [n for n in maps.find_columns([run]) if n.role == "transformer"]
    again, _ = [n for n in maps.find_columns([tuned]) if n.role == "transformer"]
    expected = build_model("test_vit", "random", 32, outputs=4, seed=3).state_dict()
    for found in (start, again):
        assert not found.trained and found.caption == "start of cass-scans (random, seed 3)\ntest_vit"
        assert all(torch.equal(value, expected[name]) for name, value in found.model.state_dict().items())
    assert start.key == again.key and trained.trained and trained.caption == "cass-scans\ntest_vit"
    assert not torch.equal(trained.model.head.weight, expected["head.weight"])


def test_a_run_without_its_start_stands_alone(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lost = make_run(tmp_path / "lost", data, weights=tmp_path / "gone")
    assert [n.trained for n in maps.find_columns([lost])] == [True, True]
    assert "start weights" in capsys.readouterr().out
    maps.main(["--weights", str(lost), "--data", str(data), "--cka", "8", "--batch-size", "4"])
    assert len(np.load(lost / "maps" / "cka.npz")) == 1


def test_networks_of_any_name_are_told_apart(data: Path, tmp_path: Path) -> None:
    supervised = make_run(tmp_path / "supervised", data, wide="test_resnet", narrow="test_vit")
    assert [(n.role, n.trained) for n in maps.find_columns([supervised])] == [
        ("transformer", False), ("transformer", True), ("cnn", False), ("cnn", True)]


def test_the_command_draws_all_pictures_with_captions(data: Path, run: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    said, words = [], pictures.words
    monkeypatch.setattr(pictures, "words", lambda text, *size: said.append(text) or words(text, *size))
    other = make_run(tmp_path / "supervised", data, seed=4, cnn_b="test_resnet", vit_b="test_vit")
    image = data / "test" / "a" / "0.png"
    out = tmp_path / "out"
    maps.main(["--weights", str(run), "--weights", str(other), "--image", str(image), "--data", str(data),
               "--average", "6", "--cka", "--batch-size", "5", "--out", str(out), "--device", "cpu"])
    names = ["attention-0-block0", "attention-average6-block0", "cka", "features-0"]
    assert sorted(file.name for file in out.iterdir()) == sorted(f"{n}.{end}" for n in names for end in ("npz", "png"))
    for name in names:
        with Image.open(out / f"{name}.png") as picture:
            assert 700 < picture.width < 2000 and 300 < picture.height < 2000
            assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 50
    text = "\n".join(said)
    for caption in ("start of cass-scans (random, seed 3)\ntest_vit", "supervised\ntest_resnet", "block 0", "0.png",
                    "6 test images of scans (4 a, 2 b)", "convolution 5", "whole batches of 5", "before", "after"):
        assert caption in text, caption
    average = np.load(out / "attention-average6-block0.npz")
    assert list(average) == ["start of cass-scans (random, seed 3) test_vit", "cass-scans test_vit",
                             "start of supervised (random, seed 4) test_vit", "supervised test_vit"]
    trained = next(n.model for n in maps.find_columns([run]) if n.trained and n.role == "transformer")
    rows, _ = maps.sample_rows(data, [run], 6)
    one_by_one = [maps.class_attention(trained, next(iter(maps.batches(data, [row], 32)))) for row in rows]
    np.testing.assert_allclose(average["cass-scans test_vit"], np.mean(one_by_one, axis=0)[0], rtol=1e-4)
    assert [array.shape for array in np.load(out / "cka.npz").values()] == [(6, 7)] * 4


def test_pictures_go_beside_the_run_and_equal_starts_are_drawn_once(data: Path, run: Path, tmp_path: Path) -> None:
    tuned = make_run(tmp_path / "tuned", data, weights=run)
    maps.main(["--weights", str(run), "--weights", str(tuned / "transformer.pt"), "--image",
               str(data / "test" / "b" / "1.png"), "--rollout"])
    arrays = np.load(run / "maps" / "attention-1-rollout.npz")
    assert list(arrays) == ["start of cass-scans (random, seed 3) test_vit", "cass-scans test_vit", "tuned test_vit"]
    assert all(array.shape == (2, 2) for array in arrays.values())


def test_user_errors_are_one_sentence(data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pooled = make_run(tmp_path / "two", data, cnn="test_resnet", transformer="test_vit2")  # it has no class token
    image = str(data / "test" / "a" / "0.png")
    alone = make_run(tmp_path / "again" / "cass-scans", data, backbone="test_resnet")
    (tmp_path / "file").write_text("")

    def said(*options: str, weights: Path = run) -> str:
        return sentence(capsys, lambda: maps.main(["--weights", str(weights), *options]))

    assert "test_vit2 has no class token" in said("--image", image, weights=pooled)
    assert "say what to draw" in said() and "--data DIR" in said("--average", "3")
    assert "is not there" in said("--image", str(data / "none.png"))
    assert "blocks 0 to 5" in said("--image", image, "--block", "6")
    assert "number 1" in said("--data", str(data), "--cka", weights=alone)
    assert "no Transformer" in said("--data", str(data), "--average", "3", weights=alone)
    assert "at least 4" in said("--data", str(data), "--cka", "--batch-size", "3")
    assert "is not there" in said("--image", image, weights=tmp_path / "gone.pt")
    assert "is no network" in said("--image", image, weights=tmp_path / "file")
    assert "can't be written" in said("--image", image, "--out", str(tmp_path / "file"))
    assert "same name" in said("--image", image, "--weights", str(alone))
    (pooled / "split.csv").unlink()
    assert "split.csv" in said("--data", str(data), "--average", "3", "--weights", str(pooled / "cnn.pt"))


def test_what_a_network_is_follows_from_its_weights_and_not_from_its_file(data: Path, tmp_path: Path) -> None:
    """Two CNNs, as in Table 18, have feature maps and no attention; arms the other way round are no matter."""
    image = str(data / "test" / "a" / "0.png")
    for arms, drawn in (({"cnn": "test_resnet", "transformer": "test_efficientnet"}, {"features-0"}),
                        ({"cnn": "test_vit", "transformer": "test_resnet"}, {"features-0", "attention-0-block0"})):
        run = make_run(tmp_path / arms["cnn"], data, **arms)
        maps.main(["--weights", str(run), "--image", image])
        assert {file.stem for file in (run / "maps").glob("*.png")} == drawn


# %% drawing


def test_colours_are_even_to_the_eye_and_rise_in_lightness() -> None:
    """Judged in CIELAB, another space than the one they were made in."""
    shares = pictures.colour_table() / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    f = np.cbrt(xyz / [0.9505, 1, 1.089])
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)[5:]
    assert (np.diff(lab[::5, 0]) > 0).all()
    steps = np.linalg.norm(np.diff(lab[::25], axis=0), axis=1)
    assert steps.max() < 2.5 * steps.min()


def test_paint_puts_low_values_in_dark_and_survives_constant_ones() -> None:
    table = pictures.colour_table()
    painted = np.asarray(pictures.paint(np.array([[0.0, 1.0], [2.0, np.nan]]), 0, 2, (4, 4)))
    assert painted.shape == (4, 4, 3)
    for at, colour in (((0, 0), 0), ((0, 3), 128), ((3, 0), 255)):
        assert (painted[at] == table[colour]).all()
    assert np.asarray(pictures.paint(np.ones((2, 2)), 1, 1, (2, 2))).std(axis=(0, 1)).max() == 0


def test_text_is_broken_within_its_width() -> None:
    name = "start of finetune-supervised-brain-mri-0.1 (imagenet)\nvit_base_patch16_384.augreg_in21k_ft_in1k"
    wide, narrow = pictures.words(name, 600), pictures.words(name, 150)
    assert narrow.width == 150 and narrow.height > wide.height
    ink = lambda image: (np.asarray(image.convert("L")) < 128)  # noqa: E731
    assert ink(narrow).sum() == pytest.approx(ink(wide).sum(), rel=0.1)  # nothing lost
    assert not ink(narrow)[:, -1].any() and not ink(narrow)[-1].any()
