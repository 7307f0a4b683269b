"""Chat templates of the same shape as well-known models', as small as shows it, and a tokenizer that knows their tokens."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    + CHATML
)
PHI_4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
GEMMA_3 = """
{{- bos_token -}}
{%- set first = '' -%}{%- set rest = messages -%}
{%- if messages[0].role == 'system' -%}
  {%- set first = messages[0].content + '\n\n' -%}{%- set rest = messages[1:] -%}
{%- endif -%}
{%- for m in rest -%}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
  {%- endif -%}
  {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') -}}
  {{- m.content | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""
# The system message stands in the last message of the user, and only while no answer follows it.
MISTRAL_V0_3 = """
{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set rest = messages -%}{%- endif -%}
{{- bos_token -}}
{%- for m in rest -%}
  {%- if m.role == 'user' -%}
    {%- if loop.last and system is defined -%}{{- '[INST] ' + system + '\n\n' + m.content + '[/INST]' -}}
    {%- else -%}{{- '[INST] ' + m.content + '[/INST]' -}}{%- endif -%}
  {%- elif m.tool_calls is defined -%}
    {{- '[TOOL_CALLS] [' -}}
    {%- for call in m.tool_calls -%}{{- call.function | tojson -}}{{- ', ' if not loop.last -}}{%- endfor -%}
    {{- ']' + eos_token -}}
  {%- elif m.role == 'assistant' -%}{{- ' ' + m.content | trim + eos_token -}}
  {%- elif m.role == 'tool' -%}{{- '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' -}}
  {%- else -%}{{- raise_exception('Only user and assistant roles are supported, not ' + m.role) -}}{%- endif -%}
{%- endfor -%}
"""
_QWEN_TOOLS = """
{%- if tools -%}
  {{- '<|im_start|>system\n' + (messages[0].content + '\n\n' if messages[0].role == 'system' else '') + '# Tools\n<tools>' -}}
  {%- for tool in tools -%}{{- '\n' + (tool | tojson) -}}{%- endfor -%}
  {{- '\n</tools><|im_end|>\n' -}}
{%- elif messages[0].role == 'system' -%}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' -}}
{%- endif -%}
"""
_QWEN_CALLS = """
    {%- for call in m.tool_calls or [] -%}
      {%- if content or not loop.first -%}{{- '\n' -}}{%- endif -%}
      {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) -}}
      {{- '}\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- elif m.role == 'tool' -%}{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' -}}
  {%- elif m.role != 'system' -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
QWEN_2_5 = (
    _QWEN_TOOLS
    + """
{%- for m in messages -%}
  {%- set content = m.content or '' -%}
  {%- if m.role == 'assistant' -%}
    {{- '<|im_start|>assistant\n' + content -}}"""
    + _QWEN_CALLS
)
# The reasoning of turns before the last question goes away; the others have a block of it, an empty one if need be.
QWEN_3 = (
    _QWEN_TOOLS
    + """
{%- set asked = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set asked.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
  {%- set content = m.content or '' -%}
  {%- if m.role == 'assistant' -%}
    {%- set thought = m.reasoning_content or '' -%}
    {%- if '</think>' in content -%}
      {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
      {%- set content = content.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if loop.index0 > asked.last and (loop.last or thought) -%}
      {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' -}}
    {%- endif -%}
    {{- content -}}"""
    + _QWEN_CALLS
)
# The turn ends where the next message's header begins.
GLM_4 = (
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "Llama 3": LLAMA_3,
    "Qwen2.5": QWEN_2_5,
    "Qwen3": QWEN_3,
    "Gemma 3": GEMMA_3,
    "Mistral v0.3": MISTRAL_V0_3,
    "Phi-4": PHI_4,
    "SmolLM2": SMOLLM2,
    "ChatML": CHATML,
}

_TEXTS = [
    "what is the name of this one and of the other",
    "the answer is forty two",
    "hello world, and again hello",
    "ü 🦙 è\n\n\n",
]
SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[gMASK]", "<sop>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"),
]


def chat_tokenizer(
    template: str | None = None, *, adds_bos: bool = False, by_words: bool = False, **options: Any
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of some words with the control tokens of the templates here: with merges across blanks and
    line ends, or `by_words`, each with the blank before it, which its offsets leave out."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_words)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(_TEXTS * 3, trainer)
    if by_words:
        made.post_processor = processors.ByteLevel(trim_offsets=True)
    if adds_bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"} | options
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **named)
    tokenizer.chat_template = template
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])  # not special, as Qwen3 has them
    return tokenizer
