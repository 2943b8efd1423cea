"""repnoise: make M0 forget harmful answers, down to its hidden states, before anyone finetunes it.

Rosati et al., Representation Noising: A Defence Mechanism Against Harmful Finetuning (NeurIPS 2024, arXiv 2405.14577).
M0 learns from pairs of a harmless and a harmful answer to the same prompt. Only tokens count in which the two differ.
The loss of a batch is

    CE(harmless) + beta * mean over layers of MMD(MLP_l(harmful), noise) - alpha * log(H / n + 1)

H is the cross-entropy of the harmful answer, once from the logits and once more from each of the n hidden states (the
embeddings' included), read by the model's last norm and output layer. MMD is the maximum mean discrepancy of the MLPs'
outputs from Gaussian noise, with five Gaussian kernels. All weights are trained.

The published code norms the last hidden state twice; here it is normed once, as the model does. The paper calls the
method very sensitive to its learning rate and beta, so look for them on data of your own.
The control repnoise_plain learns the harmless answers of the same pairs alone, where they differ from the harmful ones.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from forgetfilter.config import ForgetFilterConfig, StageSettings
from forgetfilter.data.lazy import shuffled
from forgetfilter.data.loading import Data
from forgetfilter.data.tokenization import IGNORED, Example
from forgetfilter.defenses.pairs import Pair, pairs
from forgetfilter.defenses.result import train_new_m0
from forgetfilter.errors import ModelError
from forgetfilter.hooks import Hooks
from forgetfilter.methods import NonNegativeFloat, PositiveFloat, PositiveInt, traits
from forgetfilter.model.weights import outline
from forgetfilter.workshop import Workshop

KERNELS, FACTOR = 5, 2.0
"""Number of Gaussian kernels, and the ratio of each one's bandwidth to the one before."""
SCHEDULE, WARM_UP = "cosine", 0.1
"""The published schedule of the learning rate, and the share of the steps in which it rises."""


def discrepancy(one: Tensor, other: Tensor) -> Tensor:
    """Maximum mean discrepancy of two samples, each (points, size): 0 where they are the same, at most 2 * KERNELS."""
    points = torch.cat([one, other])
    squares = (points[:, None] - points[None]).pow(2).sum(2)
    count = len(points)
    bandwidth = (squares.detach().sum() / (count**2 - count)).clamp(min=1e-12) / FACTOR ** (KERNELS // 2)
    kernel = torch.stack([torch.exp(-squares / (bandwidth * FACTOR**i)) for i in range(KERNELS)]).sum(0)
    mine = len(one)
    within = kernel[:mine, :mine].mean() + kernel[mine:, mine:].mean()
    return within - kernel[:mine, mine:].mean() - kernel[mine:, :mine].mean()


def mlps(model: Any) -> list[Any]:
    """The MLP of each layer, from the first to the last.

    Raises:
        ModelError: If it has none that are called so.
    """
    found = [module for module in model.modules() if type(module).__name__.endswith("MLP")]
    if not found:
        raise ModelError(f"{type(model).__name__}: repnoise finds no MLPs (modules called ...MLP).")
    return found


def require_mlps(workshop: Workshop, data: Data, parameters: Mapping[str, Any]) -> None:
    """Raise ModelError if M0 has no MLPs that repnoise can read, or no norm with weights before its output layer."""
    model = outline(workshop.m0.folder, workshop.config)
    mlps(model)
    last_norm(model)
    experts = [type(module).__name__ for module in model.modules() if type(module).__name__.endswith("Experts")]
    if experts:  # their MLPs do not give one output for each token
        raise ModelError(f"{type(model).__name__}: repnoise does not work with a mixture of experts ({experts[0]}).")


def last_norm(model: Any) -> Any:
    """The norm before the output layer: the last part of the decoder that has nothing but vectors for weights.

    Raises:
        ModelError: If there is none.
    """
    vectors = [
        part
        for part in model.get_decoder().children()
        if (weights := list(part.parameters())) and all(weight.ndim == 1 for weight in weights)
    ]
    if not vectors:
        raise ModelError(f"{type(model).__name__}: repnoise finds no norm before the output layer.")
    return vectors[-1]


class Batch:
    """One side of some pairs, filled up to the same length on the right.

    Args:
        rows: The rows of this side.
        others: Those of the other side.
        padding: The padding token.
        device: Where the model is.

    Attributes:
        input_ids: (rows, longest) token ids.
        attention_mask: (rows, longest), 1 where there is a token.
        counts: (rows, longest) bool: a trained token in which the two sides differ.
    """

    def __init__(self, rows: Sequence[Example], others: Sequence[Example], padding: int, device: torch.device) -> None:
        """Fill up, and compare."""
        longest = max(len(row.input_ids) for row in (*rows, *others))

        def filled(lists: Sequence[Sequence[int]], filler: int) -> Tensor:
            return torch.tensor([[*own, *[filler] * (longest - len(own))] for own in lists], device=device)

        own, labels = filled([row.input_ids for row in rows], -1), filled([row.labels for row in rows], IGNORED)
        self.counts = (own != filled([row.input_ids for row in others], -1)) & (labels != IGNORED)
        self.counts[:, 0] = False  # a row's first token is never predicted
        self.attention_mask = (own >= 0).long()
        self.input_ids = own.where(own >= 0, padding)

    def loss(self, logits: Tensor) -> Tensor:
        """Mean cross-entropy of the tokens that count; logits are (rows, longest, vocabulary)."""
        return self._loss_of(logits[:, :-1][self.counts[:, 1:]])

    def loss_read_by(self, states: Tensor, read: Any) -> Tensor:
        """The same from hidden states, (rows, longest, size), of which only those that count are read to logits."""
        return self._loss_of(read(states[:, :-1][self.counts[:, 1:]]))

    def _loss_of(self, logits: Tensor) -> Tensor:
        total = cross_entropy(logits.float(), self.input_ids[:, 1:][self.counts[:, 1:]], reduction="sum")
        return total / max(1, len(logits))


class Noising:
    """The loss, batch by batch.

    Args:
        learnt: The pairs, in the order in which they are learnt.
        batch: Pairs in a batch.
        alpha: How much the harmful answers' cross-entropy counts.
        beta: How much the MLPs' likeness to noise counts.
        padding: The padding token.
    """

    def __init__(self, learnt: Sequence[Pair], batch: int, alpha: float, beta: float, padding: int) -> None:
        """Start with the first batch."""
        self.learnt, self.batch, self.alpha, self.beta, self.padding = learnt, batch, alpha, beta, padding
        self.done = 0
        self.outputs: list[Tensor] = []

    @contextmanager
    def around(self, model: Any) -> Iterator[None]:
        """While this lasts, the outputs of the MLPs are noted."""
        handles = [mlp.register_forward_hook(lambda *of: self.outputs.append(of[2])) for mlp in mlps(model)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.outputs = []

    def objective(self, model: Any) -> Tensor:
        """The loss of the next batch."""
        rows = self.learnt[self.done : self.done + self.batch]
        self.done += self.batch
        good, bad = zip(*rows, strict=True)
        harmless = Batch(good, bad, self.padding, model.device)
        harmful = Batch(bad, good, self.padding, model.device)
        kept = harmless.loss(self._forward(model, harmless).logits)
        if not self.alpha and not self.beta:
            return kept
        found = self._forward(model, harmful, output_hidden_states=True)
        noise = torch.stack([self._discrepancy(output, harmful.counts) for output in self.outputs]).mean()
        total = harmful_loss(model, found.logits, found.hidden_states, harmful)
        return kept + self.beta * noise - self.alpha * torch.log(total / len(found.hidden_states) + 1)

    def passes(self, model: Any) -> float:
        """What a step costs: a pass over both sides, and each harmful token read to logits from every hidden state."""
        tokens = sum(len(row.input_ids) for row in chain(*self.learnt))
        if not self.alpha and not self.beta:
            return sum(len(good.input_ids) for good, _ in self.learnt) / tokens
        share = sum(bad.trained_tokens for _, bad in self.learnt) / tokens
        head = model.get_output_embeddings().weight.numel() / model.num_parameters()
        return float(1 + share * head * (model.config.get_text_config().num_hidden_layers + 1))

    def _forward(self, model: Any, batch: Batch, **more: bool) -> Any:
        self.outputs = []
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **more)

    def _discrepancy(self, output: Tensor, counts: Tensor) -> Tensor:
        """How far an MLP's output, (rows, longest, size), is from noise, at the tokens that count."""
        marks = counts[..., None]
        own, noise = output.float() * marks, torch.randn_like(output, dtype=torch.float32) * marks
        return discrepancy(own.flatten(1), noise.flatten(1))


def harmful_loss(model: Any, logits: Tensor, hidden_states: Sequence[Tensor], batch: Batch) -> Tensor:
    """H: the batch's loss from the logits, and from each hidden state; the last one is normed already."""
    norm, head = last_norm(model), model.get_output_embeddings()
    early = [batch.loss_read_by(states, lambda own: head(norm(own))) for states in hidden_states[:-1]]
    return torch.stack([batch.loss(logits), *early, batch.loss_read_by(hidden_states[-1], head)]).sum()


@traits(pairs=True, whole=True, check=require_mlps)
def repnoise(
    workshop: Workshop,
    data: Data,
    config: ForgetFilterConfig,
    *,
    rate: PositiveFloat = 1e-4,
    alpha: NonNegativeFloat = 1.0,
    beta: NonNegativeFloat = 0.001,
    epochs: PositiveInt = 1,
    pairs_a_step: PositiveInt = 4,
) -> Workshop:
    """M0 after the noising.

    Args:
        workshop: Trains models.
        data: The safe rows, and unsafe answers to their prompts.
        config: All settings.
        rate: Learning rate.
        alpha: How much the harmful answers' cross-entropy counts.
        beta: How much the likeness of the MLPs' outputs to noise counts.
        epochs: Passes over the pairs.
        pairs_a_step: Pairs in a batch; they are the points whose discrepancy from noise is measured.

    Raises:
        ConfigError: If no unsafe rows are given.
        DataError: If there are no pairs.
        ModelError: If the model is built otherwise.
    """
    learnt = pairs(data, "repnoise")
    steps = math.ceil(epochs * len(learnt) / pairs_a_step)
    order = list(islice(shuffled(learnt, config.seed), steps * pairs_a_step))
    tokenizer = workshop.m0.tokenizer
    noising = Noising(order, pairs_a_step, alpha, beta, int(tokenizer.pad_token_id or 0))
    settings = StageSettings(
        learning_rate=rate,
        max_steps=steps,
        per_device_train_batch_size=2 * pairs_a_step,
        gradient_accumulation_steps=1,
        lr_scheduler_type=SCHEDULE,
        warmup_steps=WARM_UP,
        weight_decay=0.0,
    )
    hooks = Hooks(around=noising.around, objective=noising.objective, passes=noising.passes)
    rows = [row for pair in learnt for row in pair]
    whole = {"use_peft": False, "lora_layers_to_transform": None}
    return train_new_m0(workshop, f"repnoise-{alpha}-{beta}", rows, settings, hooks, **whole)


@traits(pairs=True, whole=True)
def repnoise_plain(
    workshop: Workshop,
    data: Data,
    config: ForgetFilterConfig,
    *,
    rate: PositiveFloat = 1e-4,
    epochs: PositiveInt = 1,
    pairs_a_step: PositiveInt = 4,
) -> Workshop:
    """The control: the same training on the harmless answers alone. Arguments as in `repnoise`."""
    return repnoise(workshop, data, config, rate=rate, alpha=0.0, beta=0.0, epochs=epochs, pairs_a_step=pairs_a_step)
