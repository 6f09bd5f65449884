"""BLIP-VQA of T2I-CompBench (Huang et al. 2023, arXiv 2307.06350): is each thing that the prompt names in the image?

Every noun phrase of the prompt becomes a question, "a red apple?", to a BLIP (Li et al. 2022, arXiv 2201.12086) that
was trained to answer questions; the score is the product of its probabilities of yes.

As in the benchmark's code (BLIPvqa_eval): images squashed to 480 px, up to 8 phrases, the token [ENC] before
the question, and the probability of "yes" against "no" alone, as first token of the answer. What differs: the phrases
come from rules (`sharpening/rewards/noun_phrases.py` counts where they agree) and not from spaCy, nothing is rounded
to four digits or to 8 bits, and a prompt without a noun phrase is one question as a whole where the benchmark gives
it 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sharpening.errors import UserError, first_line
from sharpening.rewards.checkpoint_files import find_pretrained
from sharpening.rewards.noun_phrases import noun_phrases
from sharpening.rewards.preprocessing import in_slices, preprocess

# Those of the benchmark. transformers' conversion of BLIP's weights is made for 384 px, so its position embeddings are
# interpolated to 480, from which they once were to 384.
IMAGE_SIZE, MAX_PHRASES, MAX_TOKENS = 480, 8, 35
_DROPPED = str.maketrans("", "", '.!"()*#:;~')  # signs that BLIP's questions were trained without


def questions(prompt: str) -> list[str]:
    """What is asked of an image for this prompt: from one to 8 questions, lower case."""
    phrases = noun_phrases(prompt)[:MAX_PHRASES] or [prompt]
    return [f"{phrase}?".lower().translate(_DROPPED) for phrase in phrases]


class BLIPVQAScorer:
    """A transformers BlipForQuestionAnswering with its tokenizer and preprocessing, on a device.

    Args:
        flag: what the user wrote, for error messages.
        model: hub id or folder of the model and its processor.
        device: where it runs.
        dtype: of weights and activations; None is float32.
        cache_dir: where downloads are kept.

    Raises:
        UserError: naming `flag`, if a part cannot be had or does not fit; what is cheap to read is checked first.
    """

    def __init__(
        self, flag: str, model: str, device: str | torch.device, dtype: torch.dtype | None, cache_dir: str | None
    ) -> None:
        model = find_pretrained(flag, model, {"blip"}, "a BLIP", "BlipForQuestionAnswering")
        from transformers import BlipConfig, BlipForQuestionAnswering, BlipProcessor

        self.device, self.dtype = torch.device(device), dtype or torch.float32
        try:
            self.decoder_start = BlipConfig.from_pretrained(model, cache_dir=cache_dir).text_config.bos_token_id
            processor = BlipProcessor.from_pretrained(model, cache_dir=cache_dir)
            self.tokenizer, self.image_processor = processor.tokenizer, processor.image_processor
            self.answers = self.tokenizer.convert_tokens_to_ids(["yes", "no"])
            if len(set(self.answers) - {self.tokenizer.unk_token_id}) < 2:  # also when no vocabulary was found
                raise OSError("its tokenizer has no words yes and no")
            self.blip, loading = BlipForQuestionAnswering.from_pretrained(
                model, dtype=self.dtype, cache_dir=cache_dir, output_loading_info=True
            )
            if loading["missing_keys"]:  # transformers would leave them random
                raise OSError(
                    f"it lacks {len(loading['missing_keys'])} weights, {min(loading['missing_keys'])} for one"
                )
        except Exception as error:
            raise UserError(
                f"{flag} could not be loaded ({first_line(error)}); check the name and the connection, or give a "
                "folder that holds a BlipForQuestionAnswering, its tokenizer and its preprocessor_config.json"
            ) from error
        self.blip.to(self.device).eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores `(B,)` float32 in [0, 1] of images `(B, 3, H, W)` in [0, 1]."""
        asked = [questions(prompt) for prompt in prompts]
        image_of = torch.tensor([row for row, each in enumerate(asked) for _ in each], device=self.device)  # (Q,)
        probabilities = self.probability_of_yes(images, [question for each in asked for question in each], image_of)
        return torch.ones(len(prompts), device=self.device).scatter_reduce(0, image_of, probabilities, "prod")

    def probability_of_yes(self, images: Tensor, asked: list[str], image_of: Tensor) -> Tensor:
        """P(yes) / (P(yes) + P(no)) as the answer begins, `(Q,)` float32, for Q questions.

        Question q is about image `image_of[q]` of images `(B, 3, H, W)`; each image is encoded once.
        """
        processor = self.image_processor
        pixels = preprocess(
            images.to(self.device), IMAGE_SIZE, processor.image_mean, processor.image_std, resize_mode="squash"
        )
        tokens = self.tokenizer(asked, truncation=True, max_length=MAX_TOKENS).input_ids
        lengths = torch.tensor([len(ids) for ids in tokens], device=self.device)
        probabilities = torch.empty(len(asked), device=self.device)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            features = in_slices(self._see, pixels.to(self.dtype))  # (B, patches + 1, D)

            def answer(image_of: Tensor, input_ids: Tensor) -> Tensor:
                return self._answer(features[image_of], input_ids)

            # Questions of one length at a time, without padding: the decoder of transformers 5.23 attends to it,
            # because its cross-attention loses the mask.
            for length in lengths.unique():
                rows = (lengths == length).nonzero().flatten()
                input_ids = torch.tensor([tokens[row] for row in rows], device=self.device)
                input_ids[:, 0] = self.decoder_start + 1  # [ENC]: BLIP added [DEC], with which answers start, then it
                probabilities[rows] = in_slices(answer, image_of[rows], input_ids)
        return probabilities

    def _see(self, pixels: Tensor) -> Tensor:
        return self.blip.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state

    def _answer(self, features: Tensor, input_ids: Tensor) -> Tensor:
        states = self.blip.text_encoder(input_ids, encoder_hidden_states=features).last_hidden_state
        start = torch.full_like(input_ids[:, :1], self.decoder_start)
        logits = self.blip.text_decoder(start, encoder_hidden_states=states, use_cache=False).logits[:, 0]
        yes, no = logits[:, self.answers].float().unbind(dim=1)
        return torch.sigmoid(yes - no)  # the softmax over the two
