"""Writes beam_search.txt: what transformers' generate finds by beam search in a toy model.

Made with transformers 5.24.0, torch: python tests/golden/make_beam_search.py > tests/golden/beam_search.txt
The model is a table: the logits of the next token are a function of the last two (logit() here and in
tests/beam_search). Each line: beams, length penalty, stopping, end tokens (a count, then they), most new
tokens, sequences of the batch; then for each of them `beams` hypotheses: length, tokens, score.
"""
import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

VOCAB = 13


def logit(before, last, token):
    return ((before * 37 + last * 101 + token * 57 + (before + 2) * (last + 3) * (token + 5)) % 211) / 32


TABLE = torch.tensor([[[logit(a, b, t) for t in range(VOCAB)] for b in range(VOCAB)] for a in range(VOCAB)])


class Toy(PreTrainedModel, GenerationMixin):
    config_class = PretrainedConfig
    _supports_cache_class = False

    def __init__(self, config):
        super().__init__(config)
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.post_init()

    def forward(self, input_ids, **_):
        return CausalLMOutput(logits=TABLE[input_ids[:, -2], input_ids[:, -1]][:, None, :])

    def prepare_inputs_for_generation(self, input_ids, **_):
        return {"input_ids": input_ids}


def main():
    config = PretrainedConfig(vocab_size=VOCAB, is_encoder_decoder=False)
    config.num_hidden_layers = 1
    model = Toy(config).eval()
    prompts = torch.tensor([[1, 4], [7, 9], [3, 12]])
    for beams in (2, 3):
        for penalty in (0.0, 1.0, -0.5, 1.7):
            for stopping in (False, True, "never"):
                for ends in ([5], [5, 8]):
                    for most in (1, 4, 12):
                        if most == 4 and beams == 2:
                            continue
                        generation = GenerationConfig(
                            num_beams=beams, num_return_sequences=beams, length_penalty=penalty, early_stopping=stopping,
                            eos_token_id=ends, pad_token_id=0, max_new_tokens=most, do_sample=False, use_cache=False,
                            return_dict_in_generate=True, output_scores=True)
                        out = model.generate(prompts, generation_config=generation)
                        words = [beams, penalty, {False: 0, True: 1, "never": 2}[stopping], len(ends), *ends, most, len(prompts)]
                        for row, score in zip(out.sequences[:, 2:].tolist(), out.sequences_scores.tolist()):
                            end = next((i + 1 for i, t in enumerate(row) if t in ends), len(row))
                            words += [end, *row[:end], f"{score:.7g}"]
                        print(*words)


main()
