"""BERTScore (Zhang et al., 2020) of summaries, by the library bert-score: how alike their tokens are to an encoder.

F1 without idf weights and without rescaling to a baseline, 0 to 1 in practice. The tokens are seen after the layer that the
library recommends for a model of that name, and after the last layer of a model that it does not know.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from s2l_ray.errors import ConfigError
from s2l_ray.training.locations import local_place
from s2l_ray.training.models import check_bert_score, positions

# BERT's and RoBERTa's kin keep up to two positions for themselves.
RESERVED_POSITIONS = 2


class BertScore:
    """Scores summaries with one encoder, which stays in memory. Raises ConfigError where it cannot be loaded."""

    def __init__(self, model: str, device: Any) -> None:
        import torch
        from bert_score.utils import model2layers
        from safetensors import SafetensorError
        from transformers import AutoModel, AutoTokenizer

        check_bert_score(model)
        place = local_place(model)
        try:
            encoder = AutoModel.from_pretrained(place, use_safetensors=True, dtype=torch.float32)
            self._tokenizer = AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"evaluation.bert_score_model '{model}': cannot be loaded ({reason}). Give an encoder with a tokenizer and "
                "safetensors."
            ) from error
        encoder = encoder.get_encoder() if encoder.config.is_encoder_decoder else encoder
        layer = model2layers.get(model, model2layers.get(model.rstrip("/").rpartition("/")[2]))
        most = int(encoder.config.num_hidden_layers)
        self._encoder, self._layer = encoder.to(device).eval(), min(layer or most, most)
        longest = positions(encoder)
        if longest is not None and self._tokenizer.model_max_length > longest:  # it does not say
            self._tokenizer.model_max_length = longest - RESERVED_POSITIONS

    def __call__(self, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """F1 of every prediction against its reference; 0 for an empty one. It does not depend on the others."""
        from bert_score.utils import bert_cos_score_idf

        scores, said = [0.0] * len(predictions), [i for i, text in enumerate(predictions) if text.strip()]
        if not said:
            return scores
        # The marks at both ends do not count.
        weights = defaultdict(lambda: 1.0, {self._tokenizer.sep_token_id: 0.0, self._tokenizer.cls_token_id: 0.0})
        references_said, predictions_said = [references[i] for i in said], [predictions[i] for i in said]
        found = bert_cos_score_idf(
            self._at_layer(), references_said, predictions_said, self._tokenizer, weights, device=self._encoder.device
        )
        for i, score in zip(said, found[:, 2].tolist(), strict=True):
            scores[i] = float(score)
        return scores

    def _at_layer(self) -> Any:
        """The encoder as the library calls one: what it gives is the chosen layer's output."""
        from torch import nn

        encoder, layer = self._encoder, self._layer

        class AtLayer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.encoder = encoder

            def forward(self, ids_BL: Any, attention_mask: Any, **_: Any) -> tuple[Any]:
                return (self.encoder(ids_BL, attention_mask=attention_mask, output_hidden_states=True).hidden_states[layer],)

        return AtLayer()
