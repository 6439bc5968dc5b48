"""Break it yourself (README): one-line edits of cass.py, and the gauge by which each is seen.

Each edit is made in a copy of the file's text, which is then executed and trained for 48 steps on
16 patterns of colour and stripes, beside the file as it is.
"""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from metrics import Gauges

SOURCE = (Path(__file__).resolve().parents[1] / "cass.py").read_text(encoding="utf-8")
PATTERNS = 16  # images in a batch, of a pattern each


class SmallTransformer(nn.Module):
    """Patches of 8 x 8, one block, 16 outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.position = nn.Parameter(0.02 * torch.randn(1, 16, 32))
        self.block = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True,
                                                norm_first=True)
        self.head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT + self.position
        return self.head(self.block(tokens).mean(1))


def small_cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
                         nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 16))


def pattern_batches() -> list[Tensor]:
    """16 batches `(16, 3, 32, 32)`: each of all patterns, with the stripes elsewhere and noise."""
    generator = torch.Generator().manual_seed(0)
    colour = torch.rand(PATTERNS, 3, 1, 1, generator=generator)
    waves = 1.5 * torch.rand(2, PATTERNS, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    batches = []
    for _ in range(16):
        shift = 2 * math.pi * torch.rand(PATTERNS, 1, 1, generator=generator)
        stripes = torch.sin(waves[0] * y + waves[1] * x + shift).unsqueeze(1)
        noise = torch.randn(PATTERNS, 3, 32, 32, generator=generator)
        batches.append(2 * colour - 1 + 0.7 * colour * stripes + 0.2 * noise)
    return batches


@cache
def last_row(loss: str, old: str = "", new: str = "") -> dict[str, float]:
    """The log's last row after three epochs with `new` in place of `old`."""
    assert not old or SOURCE.count(old) == 1, f"cass.py has another line than {old!r} by now"
    edited = ModuleType("edited")
    exec(compile(SOURCE.replace(old, new) if old else SOURCE, "cass.py", "exec"), vars(edited))
    torch.manual_seed(0)
    arms, rows = {"cnn": small_cnn(), "transformer": SmallTransformer()}, []
    edited.pretrain_cass(*arms.values(), pattern_batches(), epochs=3, lr=1e-3,
                         loss=getattr(edited, loss), log=rows.append, gauges=Gauges(arms))
    return rows[-1]


@pytest.mark.parametrize("loss, highest", [
    ("cass_loss", 0.2), ("contrast_loss", 0.3 * math.log(PATTERNS))])
def test_the_file_as_it_is_learns_with_both_losses(loss: str, highest: float) -> None:
    row = last_row(loss)
    assert row["loss"] < highest and row["cnn_cosine"] < 0.6 and row["cnn_rank"] > 4
    assert 0 < row["cnn_moved"] < 0.12 and 0 < row["transformer_moved"] < 0.12


@pytest.mark.parametrize("loss, old, new, seen", [
    ("cass_loss", "r = normalize(cnn_logits.float(), dim=1, eps=eps)", "r = cnn_logits.float()",
     lambda row, whole: row["loss"] < -1),  # it lies between 0 and 4
    ("cass_loss", "scaler.scale(value)", "scaler.scale(-value)",
     lambda row, whole: row["loss"] > 3.5),  # the arms point opposite ways
    ("contrast_loss", "optimizer.zero_grad()", "pass",
     lambda row, whole: row["cnn_moved"] > 2 * whole["cnn_moved"]
        and row["transformer_moved"] > 2 * whole["transformer_moved"]
        and row["loss"] > 1.5 * whole["loss"]),
    ("contrast_loss", "logits = cnn(images), ", "logits = cnn(images).detach(), ",
     lambda row, whole: row["cnn_moved"] == 0 < row["transformer_moved"]
        and row["cnn_cosine"] > 2 * whole["cnn_cosine"]),
    ("contrast_loss", "temperature: float = 0.1", "temperature: float = 10",
     lambda row, whole: row["loss"] > 0.9 * math.log(PATTERNS)),  # near chance
])
def test_an_edit_moves_the_gauge_that_shows_it(loss: str, old: str, new: str,
                                               seen: Callable) -> None:
    whole, row = last_row(loss), last_row(loss, old, new)
    assert seen(row, whole), (row, whole)
    assert not seen(whole, whole), "the file as it is looks like that too"
