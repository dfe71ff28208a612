"""The arithmetic study's protocol written straightforwardly, as the benchmark's yardstick and the tests' reference.

Item by item from an IterableDataset through a DataLoader, nn.MultiheadAttention over all four positions of every sequence,
AdamW as it comes. Same function as `eval.arithmetic` computes; `copy_weights` gives it the same values.
"""

import random
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset


class Pairs(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Endless (tokens [4], answer) drawn with replacement."""

    def __init__(self, pairs: list[tuple[int, int, int]], seed: int) -> None:
        self.pairs, self.random = pairs, random.Random(seed)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            a, b, answer = self.random.choice(self.pairs)
            yield torch.tensor([a + 2, 0, b + 2, 1]), torch.tensor(answer)


class Layer(nn.Module):
    """A post-norm layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads)
        self.attention_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.mlp_norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.full((len(x), len(x)), -float("inf"), device=x.device).triu(1)
        x = self.attention_norm(x + self.attention(x, x, x, attn_mask=mask)[0])
        return self.mlp_norm(x + self.mlp(x))


class Network(nn.Module):
    """Tokens [B, 4] -> logits [B, 4, classes]."""

    def __init__(self, symbols: int, layers: int = 2, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(symbols + 2, width), nn.Embedding(5, width)
        self.layers = nn.Sequential(*[Layer(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = (self.tokens(tokens) + self.positions(places)).transpose(0, 1)
        found: torch.Tensor = self.head(self.norm(self.layers(x))).transpose(0, 1)
        return found


def plain_names(parameters: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Names of a network's parameters -> those of a plain source, its operator's token being 0 and "=" being 1."""
    names = {"tokens.weight": "s0.embedding.tokens", "positions.weight": "s0.embedding.positions"}
    layers = {name.split(".")[2] for name in parameters if name.startswith("s0.layers.")}
    for kind in ("weight", "bias"):
        names |= {f"norm.{kind}": f"s0.norm.{kind}", f"head.{kind}": f"s0.head.{kind}"}
        for i in layers:
            own, other = f"layers.{i}", f"s0.layers.{i}"
            names |= {
                f"{own}.attention.in_proj_{kind}": f"{other}.attention.qkv.{kind}",
                f"{own}.attention.out_proj.{kind}": f"{other}.attention.out.{kind}",
                f"{own}.attention_norm.{kind}": f"{other}.attention_norm.{kind}",
                f"{own}.mlp.0.{kind}": f"{other}.up.{kind}",
                f"{own}.mlp.2.{kind}": f"{other}.down.{kind}",
                f"{own}.mlp_norm.{kind}": f"{other}.mlp_norm.{kind}",
            }
    return names


def copy_weights(network: Network, parameters: Mapping[str, torch.Tensor]) -> None:
    """Gives a network the values of a plain source."""
    network.load_state_dict({name: parameters[key] for name, key in plain_names(parameters).items()})


class Training:
    """The protocol's loop, a round at a time."""

    def __init__(self, network: Network, train: list[tuple[int, int, int]], validation: list[tuple[int, int, int]]) -> None:
        self.network = network
        self.batches = iter(DataLoader(Pairs(train, 0), batch_size=512))
        self.validation = iter(DataLoader(Pairs(validation, 1), batch_size=512))
        self.optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.5)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, lambda update: min(update / 50, 1))

    def update(self, tokens: torch.Tensor, answer: torch.Tensor) -> tuple[float, float]:
        """(loss, accuracy) of a batch before its update."""
        self.network.train()
        self.optimiser.zero_grad()
        logits = self.network(tokens)[:, -1]
        loss = functional.cross_entropy(logits, answer)
        accuracy = (logits.argmax(-1) == answer).float().mean()
        loss.backward()
        self.optimiser.step()
        self.schedule.step()
        return loss.item(), accuracy.item()

    def round(self) -> None:
        """Ten updates and an evaluation on eight batches."""
        for _ in range(10):
            self.update(*next(self.batches))
        self.network.eval()
        with torch.no_grad():
            for _ in range(8):
                tokens, answer = next(self.validation)
                logits = self.network(tokens)[:, -1]
                functional.cross_entropy(logits, answer).item()
                (logits.argmax(-1) == answer).float().mean().item()
