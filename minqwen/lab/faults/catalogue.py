"""The table of mistakes: name, kind, first wrong point, symptom, source, and how it is made.

Where a source is "common in ports", it was seen in many of them, and no public report is known that
shows it alone. What is wrong with scores alone leaves the first token's logits right, because that
token attends to itself only.
"""

from __future__ import annotations

from minqwen.checks import did_you_mean
from minqwen.config import ModelConfig
from minqwen.errors import MinqwenError
from minqwen.lab.faults import attention, extension, layers, outputs, rotary, weights
from minqwen.lab.faults.fault import Fault

PORTS = "common in ports"

ENGINE = (
    # ---- rotary position embedding and YaRN
    Fault(
        "rope-interleaved",
        "operation",
        "layers.0.attn.rot_q",
        "Dimensions 2i and 2i + 1 are turned together, not i and i + d/2: the first token is right "
        "and all later ones are wrong.",
        "Meta's Llama has these pairs: convert_llama_weights_to_hf.py permutes its weights",
        ops=rotary.Interleaved,
    ),
    Fault(
        "rope-table-interleaved",
        "operation",
        "layers.0.attn.rot_q",
        "cos and sin of pairs 0, 0, 1, 1, ... meet dimensions that are paired i with i + d/2, so "
        "that the two of a pair are turned by different angles.",
        "huggingface/transformers #47403, in Qwen2.5-Omni",
        ops=rotary.TableInterleaved,
    ),
    Fault(
        "rope-backwards",
        "operation",
        "layers.0.attn.rot_q",
        "The sign of sin is wrong: every distance between tokens counts backwards.",
        PORTS,
        ops=rotary.Backwards,
    ),
    Fault(
        "rope-theta-10000",
        "config",
        "layers.0.attn.rot_q",
        "rope_theta is 10,000: near tokens are nearly right, and the error grows with the distance "
        "between tokens.",
        "the default of transformers, where config.json has no rope_theta",
        change=rotary.theta_of_llama,
        needs=weights.OTHER_THETA,
    ),
    Fault(
        "rope-frequencies-bfloat16",
        "operation",
        "layers.0.attn.rot_q",
        "The frequencies were rounded to bfloat16 together with the weights: the error grows with "
        "the position.",
        "huggingface/transformers #25681; sgl-project/sglang-jax #1472",
        ops=rotary.FrequenciesInBfloat16,
    ),
    Fault(
        "positions-from-one",
        "operation",
        "layers.0.attn.rot_q",
        "The first token has position 1: queries and keys differ, and their scores do not.",
        PORTS,
        ops=rotary.FromOne,
        silent="scores depend on the distance of two positions, which is right",
    ),
    Fault(
        "query-one-ahead",
        "operation",
        "layers.0.attn.rot_q",
        "A query has the position of the next token, its key the right one: every distance is one "
        "too long.",
        PORTS,
        ops=rotary.QueriesOneAhead,
        needs=attention.GROUPS,
    ),
    Fault(
        "positions-restarted",
        "operation",
        "layers.0.attn.rot_q",
        "Positions begin at 0 again in every chunk of 16 tokens: the first chunk is right.",
        "Wenyueh/MinivLLM #98",
        ops=rotary.Restarted,
    ),
    Fault(
        "position-skipped-in-chunk",
        "operation",
        "layers.0.attn.rot_q",
        "Every chunk of 16 tokens begins one position too late: the first chunk is right, and "
        "within a chunk distances are.",
        PORTS,
        ops=rotary.OneSkipped,
    ),
    Fault(
        "yarn-off",
        "config",
        "layers.0.attn.rot_q",
        "rope_scaling is ignored: plain RoPE, wrong at every position but the first.",
        "transformers 4.37 to 4.43, which have no rope_scaling for Qwen2",
        change=rotary.no_yarn,
        needs=rotary.YARN,
    ),
    Fault(
        "yarn-no-attention-factor",
        "config",
        "layers.0.attn.rot_q",
        "YaRN's frequencies without its factor on cos and sin: all scores are too small.",
        PORTS,
        change=rotary.no_attention_factor,
        needs=rotary.YARN,
    ),
    Fault(
        "yarn-attention-factor-twice",
        "config",
        "layers.0.attn.rot_q",
        "YaRN's factor on cos and sin is applied twice: all scores are too large.",
        PORTS,
        change=rotary.attention_factor_twice,
        needs=rotary.YARN,
    ),
    Fault(
        "yarn-attention-factor-half",
        "config",
        "layers.0.attn.rot_q",
        "YaRN's factor was rounded to float16: all scores are wrong by up to a thousandth.",
        PORTS,
        change=rotary.attention_factor_in_half,
        needs=rotary.YARN,
    ),
    Fault(
        "yarn-linear",
        "operation",
        "layers.0.attn.rot_q",
        "All frequencies are divided by YaRN's factor, the fast ones too: near tokens are "
        "confused.",
        "common in ports that know rope_scaling's factor only",
        ops=rotary.LinearScaling,
        needs=rotary.YARN,
    ),
    # ---- q, k, v and the heads
    Fault(
        "q-bias-missing",
        "weights",
        "layers.0.attn.q",
        "q_proj's bias is dropped: attention looks at other tokens.",
        "ports of Llama's code, which has no biases",
        change=weights.missing("q_proj.bias"),
    ),
    Fault(
        "k-bias-missing",
        "weights",
        "layers.0.attn.k",
        "k_proj's bias is dropped: attention looks at other tokens.",
        "ports of Llama's code, which has no biases",
        change=weights.missing("k_proj.bias"),
    ),
    Fault(
        "v-bias-missing",
        "weights",
        "layers.0.attn.v",
        "v_proj's bias is dropped: one vector is missing from every output of a layer's "
        "attention, the same one for all tokens.",
        "ports of Llama's code, which has no biases",
        change=weights.missing("v_proj.bias"),
    ),
    Fault(
        "k-v-exchanged",
        "weights",
        "layers.0.attn.k",
        "A fused qkv_proj is split in the order q, v, k: nothing is right from the first token on.",
        "common in ports that fuse q, k and v",
        change=weights.exchanged("k_proj", "v_proj"),
    ),
    Fault(
        "heads-tiled",
        "operation",
        "layers.0.attn.scores",
        "Query head h reads key/value head h % K, not h // G: repeat in place of "
        "repeat_interleave.",
        PORTS,
        ops=attention.HeadsTiled,
        needs=attention.SEVERAL_GROUPS,
    ),
    Fault(
        "heads-exchanged",
        "weights",
        "layers.0.attn.q",
        "Query heads 0 and 1 are in each other's place, and o_proj's columns are not.",
        PORTS,
        change=weights.first_heads_exchanged,
        needs=weights.SEVERAL_HEADS,
    ),
    Fault(
        "heads-not-transposed",
        "operation",
        "layers.0.attn.z",
        "The heads' outputs are reshaped without being transposed: tokens and heads are mixed.",
        PORTS,
        ops=attention.HeadsNotTransposed,
    ),
    Fault(
        "head-dim-derived",
        "config",
        "layers.0.attn.q",
        "head_dim is hidden_size / heads although config.json says more, and the rows beyond it "
        "are dropped.",
        "vllm-project/vllm #2622; huggingface/transformers #37187",
        change=weights.head_dim_derived,
        needs=weights.WIDER_HEADS,
    ),
    # ---- scores, mask and softmax
    Fault(
        "scale-missing",
        "operation",
        "layers.0.attn.scores",
        "Scores are not divided by the root of head_dim: each token attends to hardly more than "
        "one.",
        PORTS,
        ops=attention.NoScale,
    ),
    Fault(
        "scale-of-hidden-size",
        "operation",
        "layers.0.attn.scores",
        "Scores are divided by the root of hidden_size: each token attends to nearly all others "
        "alike.",
        PORTS,
        ops=attention.ScaleOfHiddenSize,
    ),
    Fault(
        "mask-sees-next",
        "operation",
        "layers.0.attn.scores",
        "The mask is off by one: each token sees the next one. The last token is right in the "
        "first layer only.",
        PORTS,
        ops=attention.SeesNext,
    ),
    Fault(
        "mask-missing",
        "operation",
        "layers.0.attn.scores",
        "There is no mask: each token sees all later ones, so a longer text changes what was "
        "computed for its beginning.",
        PORTS,
        ops=attention.NoMask,
    ),
    Fault(
        "padding-attended",
        "operation",
        "layers.0.attn.pattern",
        "Keys are padded with zeros to a multiple of 16 and not masked there: each row of the "
        "pattern adds up to less than 1.",
        "common in ports with fixed shapes",
        ops=attention.PaddingAttended,
    ),
    Fault(
        "sliding-window",
        "operation",
        "layers.0.attn.scores",
        "sliding_window is applied although use_sliding_window is false: all is right up to that "
        "many tokens.",
        "Qwen2.5's config.json has both keys; common in ports that read the first one only",
        ops=attention.SlidingWindow,
        needs=attention.WINDOW,
    ),
    Fault(
        "softmax-bfloat16",
        "operation",
        "layers.0.attn.pattern",
        "The softmax is computed in bfloat16: probabilities are wrong by some thousandths.",
        PORTS,
        ops=attention.SoftmaxInBfloat16,
    ),
    Fault(
        "scores-float16",
        "operation",
        "layers.0.attn.scores",
        "Products of queries and keys are kept in float16 before they are scaled: beyond 65,504 "
        "they are infinite, then the softmax is NaN and the text is '!!!!'.",
        "QwenLM/Qwen3 #910",
        ops=attention.ScoresInFloat16,
    ),
    # ---- norms
    Fault(
        "norm-eps-1e-5",
        "config",
        "layers.0.norm1.normalized",
        "rms_norm_eps is 1e-5: small activations come out too small, large ones are right.",
        "Llama 2's value",
        change=weights.eps_of_llama,
        needs=weights.OTHER_EPS,
    ),
    Fault(
        "norm-eps-outside-root",
        "operation",
        "layers.0.norm1.normalized",
        "eps is added to the root and not to the mean under it: a small error, larger where the "
        "activations are small.",
        PORTS,
        ops=layers.EpsOutsideRoot,
    ),
    Fault(
        "norm-subtracts-mean",
        "operation",
        "layers.0.norm1.normalized",
        "LayerNorm in RMSNorm's place: the mean of the activations is lost, in every norm.",
        PORTS,
        ops=layers.MeanSubtracted,
    ),
    Fault(
        "norm-one-plus-weight",
        "weights",
        "layers.0.norm1",
        "Norms multiply by 1 + weight: what they give is far too large.",
        "Gemma's norm",
        change=weights.one_plus_norms,
    ),
    Fault(
        "norm-weight-cast-late",
        "operation",
        "layers.0.norm1",
        "The norm's weight is multiplied in float32, before the result is rounded: in 16 bits some "
        "last bits differ.",
        "Gemma's norm, huggingface/transformers #29402",
        rebuild=layers.cast_late,
        silent="it rounds once where the right norm rounds twice, and in float32 and float64 both "
        "round alike",
    ),
    Fault(
        "norm-reduced-bfloat16",
        "operation",
        "layers.0.norm1.normalized",
        "The mean of squares is computed in bfloat16: a norm is wrong by up to some thousandths.",
        PORTS,
        ops=layers.ReducedInBfloat16,
    ),
    Fault(
        "final-norm-missing",
        "operation",
        "final_norm.normalized",
        "The head gets the residual stream without model.norm: all layers are right, and the "
        "logits are far too large.",
        PORTS,
        rebuild=layers.drop_final_norm,
    ),
    Fault(
        "final-norm-twice",
        "operation",
        "final_norm",
        "model.norm is applied to its own output: all layers are right, and the logits are not.",
        "transformers' last hidden state is behind the norm already",
        rebuild=layers.repeat_final_norm,
    ),
    # ---- MLP and residual stream
    Fault(
        "gate-up-exchanged",
        "weights",
        "layers.0.mlp.gate",
        "A fused gate_up_proj is split in the order up, gate: silu is applied to up.",
        "common in ports that fuse gate and up",
        change=weights.exchanged("gate_proj", "up_proj"),
    ),
    Fault(
        "gelu",
        "operation",
        "layers.0.mlp.act",
        "The MLP's activation is GELU, not SiLU: a small error in every MLP.",
        "Gemma's activation",
        ops=layers.Gelu,
    ),
    Fault(
        "residual-after-norm",
        "operation",
        "layers.0.resid_mid",
        "The residual stream goes on behind each norm, not before it: what earlier layers added is "
        "scaled down again and again.",
        "BLOOM's apply_residual_connection_post_layernorm",
        rebuild=layers.add_after_norm,
    ),
    # ---- embeddings and head
    Fault(
        "head-tied",
        "weights",
        "logits",
        "The embedding is the head although the model has a head of its own: all layers are right "
        "and the text is repeated tokens.",
        "pegainfer-project/pegainfer #516",
        change=weights.head_tied,
        needs=weights.UNTIED,
    ),
    Fault(
        "head-never-loaded",
        "weights",
        "logits",
        "The checkpoint has no head because it is the embedding, and the model keeps a random one: "
        "all layers are right and the text is noise.",
        "huggingface/transformers #43429; sgl-project/sglang #630, for Qwen2",
        change=weights.head_never_loaded,
        needs=weights.TIED,
    ),
    Fault(
        "embedding-rows-shifted",
        "weights",
        "embed",
        "Each token has the embedding of the token before it in the vocabulary: nothing is right "
        "from the first point on.",
        "common in ports that split the vocabulary over ranks",
        change=weights.rows_shifted(weights.EMBEDDING),
    ),
    Fault(
        "head-rows-shifted",
        "weights",
        "logits",
        "Each logit is that of the token before it in the vocabulary: all layers are right and the "
        "text is noise.",
        "common in ports that split the vocabulary over ranks",
        change=weights.rows_shifted(weights.HEAD),
        needs=weights.UNTIED,
    ),
    # ---- what is kept of earlier tokens
    Fault(
        "stale-block",
        "cache",
        "layers.0.attn.scores",
        "The second block of 16 tokens holds old keys and values, here those of the first: all is "
        "right up to token 16.",
        "old entries of block tables: tenstorrent/tt-metal #56324",
        ops=attention.StaleBlock,
    ),
    Fault(
        "foreign-block",
        "cache",
        "layers.0.attn.scores",
        "The second block of 16 tokens is that of another text of the batch: it shows only where "
        "several texts run together.",
        "tenstorrent/vllm-tt-plugin #103",
        ops=attention.ForeignBlock,
    ),
    Fault(
        "chunk-tail-lost",
        "cache",
        "layers.0.attn.scores",
        "The keys and values of the last 4 tokens of a chunk of 16 were not written: zeros are "
        "read there.",
        PORTS,
        ops=attention.ChunkTailLost,
    ),
    Fault(
        "kv-cache-int8",
        "cache",
        "layers.0.attn.scores",
        "Keys and values are kept in int8, a scale for each token and head: a small error, also in "
        "what the first token reads of itself.",
        "engines with a quantised cache",
        ops=attention.CacheInInt8,
    ),
    Fault(
        "kv-cache-float8",
        "cache",
        "layers.0.attn.scores",
        "Keys and values are kept in float8_e4m3 with a scale of 1: errors of some hundredths, and "
        "nothing beyond 448.",
        'vLLM with kv_cache_dtype="fp8"',
        ops=attention.CacheInFloat8,
    ),
    # ---- several ranks
    Fault(
        "shard-exchanged",
        "weights",
        "layers.0.attn.out",
        "Each of two ranks holds the other's columns of o_proj: heads meet other heads' columns.",
        "common in ports of tensor parallelism",
        change=weights.each(("o_proj.weight",), weights.halves_exchanged),
        needs=weights.EVEN_HEADS,
    ),
    Fault(
        "shard-not-added",
        "weights",
        "layers.0.attn.out",
        "What the second of two ranks adds to o_proj's and down_proj's sums is missing: each layer "
        "adds about half.",
        "common in ports of tensor parallelism",
        change=weights.each(weights.ROW_PARALLEL, weights.second_half_missing),
    ),
    Fault(
        "bias-on-every-rank",
        "weights",
        "layers.0.attn.q",
        "Each of two ranks adds the biases of q, k and v before their sums are added: they count "
        "twice.",
        "common in ports of tensor parallelism",
        change=weights.each(weights.BIASES, weights.twice),
    ),
    # ---- weights in fewer bits
    Fault(
        "weights-int8-per-group",
        "weights",
        "layers.0.attn.q",
        "The layers' matrices are int8, a scale for each 128 inputs: a small error in every layer.",
        "quantised checkpoints served under the name of the original",
        change=weights.quantised(8, weights.GROUP),
    ),
    Fault(
        "weights-int8-per-tensor",
        "weights",
        "layers.0.attn.q",
        "The layers' matrices are int8, one scale for each matrix: rows of small weights suffer.",
        "quantised checkpoints served under the name of the original",
        change=weights.quantised(8, None),
    ),
    Fault(
        "weights-int4-per-group",
        "weights",
        "layers.0.attn.q",
        "The layers' matrices are int4, a scale for each 128 inputs: a large error in every layer.",
        "quantised checkpoints served under the name of the original",
        change=weights.quantised(4, weights.GROUP),
    ),
    Fault(
        "weights-int4-per-tensor",
        "weights",
        "layers.0.attn.q",
        "The layers' matrices are int4, one scale for each matrix: rows of small weights are zero.",
        "quantised checkpoints served under the name of the original",
        change=weights.quantised(4, None),
    ),
    Fault(
        "weights-float16-flushed",
        "weights",
        "embed",
        "All weights are float16, and those below 2^-14 are zero: weights that were "
        "bfloat16 lose nothing else.",
        "common where models that were made in bfloat16 run in float16",
        change=weights.flushed_to_half,
    ),
    # ---- what is reported of the logits
    Fault(
        "logprobs-of-temperature",
        "logits",
        "",
        "Log probabilities are those after a temperature of 0.7: likely tokens are too likely.",
        "huggingface/trl #4159",
        report=outputs.of_temperature,
    ),
    Fault(
        "logprobs-of-top-k",
        "logits",
        "",
        "Log probabilities are those after top_k=20: they add up to 1 over 20 tokens.",
        "modelscope/ms-swift #8442",
        report=outputs.of_top_k,
    ),
    Fault(
        "logprobs-of-top-p",
        "logits",
        "",
        "Log probabilities are those after top_p=0.8: what remains is up to 1.25 times too likely.",
        "modelscope/ms-swift #8442",
        report=outputs.of_top_p,
    ),
    Fault(
        "logprobs-of-penalty",
        "logits",
        "",
        "Log probabilities are those after a repetition penalty of 1.05: tokens that the text has "
        "already are too unlikely.",
        'vLLM with logprobs_mode="processed_logprobs"',
        report=outputs.of_penalty,
    ),
    Fault(
        "padded-rows-sampled",
        "logits",
        "",
        "Rows of zeros that fill the head up to a multiple of 64 take part in the softmax: all "
        "probabilities are too small, and tokens are drawn that do not exist.",
        "tokens that do not exist: vllm-project/vllm #13175",
        report=outputs.with_padded_rows,
    ),
    # ---- the prompt's tokens
    Fault(
        "system-prompt-of-qwen2",
        "tokens",
        "embed",
        "The system message is Qwen2's, 'You are a helpful assistant.', not the model's own.",
        "chat templates of Qwen2 used for Qwen2.5",
        encode=outputs.with_other_system_prompt,
    ),
    Fault(
        "generation-prompt-missing",
        "tokens",
        "embed",
        "The prompt ends before the assistant's turn begins: the model may go on as the user.",
        "transformers, where add_generation_prompt is false if it is not given",
        encode=outputs.without_generation_prompt,
    ),
    Fault(
        "bos-twice",
        "tokens",
        "embed",
        "The prompt's first token is there twice: the template writes it, and the tokenizer adds "
        "it again.",
        "deepseek-ai/DeepSeek-R1 #151",
        encode=outputs.with_two_beginnings,
    ),
    Fault(
        "markers-as-text",
        "tokens",
        "embed",
        "<|im_start|> and <|im_end|> are several ordinary tokens: the model reads a text about a "
        "chat.",
        "llama.cpp, where llama_tokenize is called with parse_special=false",
        encode=outputs.with_markers_as_text,
    ),
)

# Wrong ways to add heads. The first point is that of the old heads, wherever they lie in the new
# model. A trace has more heads from layers.0.attn.q on.
EXTENSION = (
    Fault(
        "article",
        "weights",
        "",
        "The circulating recipe: append copies of q_proj's first heads, and leave o_proj and "
        "config.json alone. No engine that looks at shapes loads it.",
        "docs/head-extension.md",
        change=extension.article,
    ),
    Fault(
        "append-zero",
        "weights",
        "layers.0.attn.scores",
        "Its first repair: pad o_proj with zero columns and raise the config's head count. Some "
        "old heads read other heads' keys.",
        "docs/head-extension.md",
        change=extension.append_zero,
        needs=extension.NEXT_MULTIPLE,
    ),
    Fault(
        "append-copy",
        "weights",
        "layers.0.attn.scores",
        "Its second repair: append copies of o_proj's first columns too. The first heads also "
        "count twice.",
        "docs/head-extension.md",
        change=extension.append_copy,
        needs=extension.NEXT_MULTIPLE,
    ),
    Fault(
        "append-halved",
        "weights",
        "layers.0.attn.scores",
        "Its third repair: halve the copied columns of o_proj on both sides. Some heads still read "
        "other heads' keys.",
        "docs/head-extension.md",
        change=extension.append_halved,
        needs=extension.NEXT_MULTIPLE,
    ),
    Fault(
        "no-split",
        "weights",
        "layers.0.attn.out",
        "Place the copies per group, as it should be, but give each of them whole o_proj columns, "
        "so that the copied heads count twice.",
        "docs/head-extension.md",
        change=extension.no_split,
    ),
    Fault(
        "forget-bias",
        "weights",
        "layers.0.attn.q",
        "Place the copies per group, but leave q's bias in its old order and pad it with zeros at "
        "the end.",
        "docs/head-extension.md",
        change=extension.forget_bias,
    ),
    Fault(
        "derive-head-dim",
        "config",
        "layers.0.attn.q",
        "Read a right extension with head_dim = hidden_size / heads (128 becomes 112), and drop "
        "the rows and columns beyond what that expects.",
        "docs/head-extension.md",
        change=extension.derive_head_dim,
        needs=extension.WIDER_HEADS,
    ),
)

HEAD_FAULTS = {fault.name: fault for fault in EXTENSION}
FAULTS = {fault.name: fault for fault in (*ENGINE, *EXTENSION)}


def find(name: str) -> Fault:
    """The mistake of that name. Raises MinqwenError for an unknown one, with the nearest."""
    if name not in FAULTS:
        raise MinqwenError(
            f"no mistake is called {name!r}: `tools/trace.py faults` lists them"
            f"{did_you_mean(name, FAULTS)}"
        )
    return FAULTS[name]


def hypotheses(config: ModelConfig) -> list[Fault]:
    """The mistakes that a model with this config can have and that a trace of it shows."""
    return [f for f in FAULTS.values() if f.in_model and f.first and f.applies(config)]
