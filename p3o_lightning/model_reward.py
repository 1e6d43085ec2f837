"""A trained reward model as a reward source: what it reads of a response, in whose tokens, and how it ends."""

from __future__ import annotations

import sys
import warnings

import torch
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from p3o_lightning.casting import cast_once
from p3o_lightning.data_formats import Row, Text, Unusable
from p3o_lightning.encoding import Encoder, encode_prompt, encode_response
from p3o_lightning.forwards import eval_mode
from p3o_lightning.responses import Responses
from p3o_lightning.scoring import grouped_scores
from p3o_lightning.sequences import pad_right
from p3o_lightning.tokenizers import same_ids


class ModelReward:
    """A scalar-head model. It reads the sampled tokens themselves if it shares the policy's tokenizer, else the text, encoded anew.

    Either way the sequence ends as its training text ended: with EOS where the response ended, without where it was cut off.
    """

    batch_rows, batch_tokens = 8, 2**15  # of a forward: on a CPU what a core's cache holds, on a GPU what keeps it at work

    def __init__(
        self, network: PreTrainedModel | nn.Module, tokenizer: PreTrainedTokenizerBase, policy_tokenizer: PreTrainedTokenizerBase, name: str
    ):
        self.network: nn.Module = network.eval().requires_grad_(False)
        self.tokenizer, self.policy_tokenizer, self.name = tokenizer, policy_tokenizer, name
        self.same_tokens = same_tokenizer(tokenizer, policy_tokenizer)
        self.same_template = tokenizer.chat_template == policy_tokenizer.chat_template
        self._encoder = Encoder(tokenizer, "demonstrations", max_length=sys.maxsize)
        self._turn_end: list[int] | None = None
        self._warned = False

    @torch.no_grad()
    def __call__(self, responses: Responses) -> Float[Tensor, "prompt response"]:
        """Rewards in the model's logits, float32 at least."""
        prompts = responses.prompts.prompts
        same = self.same_tokens and (self.same_template or all(isinstance(prompt, str) for prompt in prompts))
        rows = self._token_rows(responses) if same else self._encoded_rows(responses)
        device, count = next(self.network.parameters()).device, responses.tokens.shape[1]
        longest = [max(map(len, rows[start : start + count])) for start in range(0, len(rows), count)]
        order = sorted(range(len(longest)), key=longest.__getitem__)  # neighbours of like length: little padding
        chunks, start = [], 0
        with eval_mode(self.network), cast_once(self.network):
            while start < len(order):
                size = self._prompts_at_once([longest[i] for i in order[start:]], count, device.type)
                texts = [row for i in order[start : start + size] for row in rows[i * count : (i + 1) * count]]
                tokens, mask = pad_right(texts, self.tokenizer.pad_token_id)
                chunks.append(grouped_scores(self.network, tokens.to(device), mask.to(device), count).cpu().view(-1, count))
                start += size
        scores = torch.cat(chunks)
        if not bool(scores.isfinite().all()):
            warnings.warn(  # an error here would stop one rank alone
                f"reward {self.name!r} gave {int((~scores.isfinite()).sum())} of {scores.numel()} responses a score that is NaN or "
                "infinite: nothing can be learned from them. Give another reward model, or a wider dtype (model.dtype float32).",
                stacklevel=2,
            )
        return scores[torch.tensor(order).argsort()]

    def _prompts_at_once(self, longest: list[int], count: int, kind: str) -> int:
        """How many of the prompts, from short to long, are scored in one forward with all their responses."""
        if kind == "cpu":
            return max(1, self.batch_rows // count)
        fitting = (size for size, tokens in enumerate(longest, 1) if size * count * tokens <= self.batch_tokens)
        return max(fitting, default=1)

    def _token_rows(self, responses: Responses) -> list[list[int]]:
        rows = []
        given = responses.prompts.tokens, responses.prompts.attention_mask, responses.tokens, responses.mask
        for prompt, kept, replies, masks in zip(*(item.cpu() for item in given), strict=True):  # a GPU would be waited for at every row
            head = prompt[kept].tolist()
            rows += [head + tokens[real].tolist() for tokens, real in zip(replies, masks, strict=True)]
        return rows

    def _encoded_rows(self, responses: Responses) -> list[list[int]]:
        """Prompt and response in the reward model's own tokens and chat template, encoded as its training data was."""
        rows, unreadable = [], 0
        eos = self.policy_tokenizer.eos_token_id
        for prompt, texts, tokens, masks in zip(responses.prompts.prompts, responses.texts, responses.tokens, responses.mask, strict=True):
            head, bodies = self._encoded(prompt, texts)
            for text, ids, mask, body in zip(texts, tokens, masks, bodies, strict=True):
                unreadable += not self._readable(text, body)
                ended = bool((ids[mask][-1:] == eos).any())
                rows.append([*head, *(body if ended else body[: -len(self._end_of_turn(prompt))])])
        if unreadable and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"reward {self.name!r} has another tokenizer than the policy, which cannot reproduce {unreadable / len(rows):.0%} of the "
                "responses (unknown characters or words): it judges them without. Take a reward model whose tokenizer covers the policy's."
            )
        return rows

    def _encoded(self, prompt: Text, texts: list[str]) -> tuple[list[int], list[list[int]]]:
        """Ids of the prompt, and of each response with its end of turn."""
        # the policy may begin its responses with a space, which a chat template supplies itself
        replies: tuple[Text, ...] = (
            tuple(texts) if isinstance(prompt, str) else tuple([{"role": "assistant", "content": text.strip()}] for text in texts)
        )
        row = next(self._encoder([Row(prompt, replies, None, {})]))
        if isinstance(row, Unusable):  # a template that rewrites replies: only prompts can go through it
            return encode_prompt(self.tokenizer, prompt), [encode_response(self.tokenizer, text) for text in texts]
        return row.prompt.tolist(), [reply.tolist() for reply in row.replies]

    def _end_of_turn(self, prompt: Text) -> list[int]:
        """What follows a response in the training data: EOS, and before it what a chat template writes there."""
        if isinstance(prompt, str):
            return [self.tokenizer.eos_token_id]
        if self._turn_end is None:
            one, other = self._encoded(prompt, ["a", "b"])[1]
            common = next((i for i in range(1, len(one)) if one[-i:] != other[-i:]), len(one)) - 1
            self._turn_end = one[-common:]
        return self._turn_end

    def _readable(self, text: str, ids: list[int]) -> bool:
        """Whether the ids give the text back, but for spacing and case, which some tokenizers drop on purpose."""
        back = str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        return "".join(text.split()).casefold() in "".join(back.split()).casefold()


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether both give the same ids to the same text and end it alike; a padding token of its own does not count."""
    if one is other:
        return True
    return (
        one.eos_token_id == other.eos_token_id
        and one.bos_token_id == other.bos_token_id
        and same_ids(one, other)
        and {token for token, _ in one.get_vocab().items() ^ other.get_vocab().items()} <= {one.pad_token, other.pad_token}
    )
