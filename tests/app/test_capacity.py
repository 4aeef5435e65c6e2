"""The planner against what publishers say of their models, and its arithmetic against what engines do."""

import json
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from app.capacity import (
    GIB,
    GPUS,
    Architecture,
    Deployment,
    Request,
    Training,
    adapter_parameters,
    fits,
    kv_bytes_per_token,
    largest_batch,
    needs,
    plain,
    read_config,
    smallest,
    tgi_arguments,
    vllm_arguments,
    weight_bytes,
)
from app.cli import app
from app.errors import InvalidRequest

MODELS = json.loads((Path(__file__).parent / "capacity_models" / "published.json").read_text())["models"]
BY_HAND = ("--parameters", "7e9", "--layers", "32", "--heads", "32", "--hidden", "4096")


def model(name: str, **changes: object) -> Architecture:
    return read_config({**MODELS[name]["config"], **changes})


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["capacity", *map(str, arguments)], env={"COLUMNS": "200"})


# --- weights and cache, as published ---


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_the_publisher_gives(name):
    published = MODELS[name]
    assert model(name).parameters == published["parameters"]
    if "bytes" in published:
        assert weight_bytes(model(name), "bfloat16") == published["bytes"] - published.get("extra_bytes", 0)


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_of_a_token_counts_key_value_heads_only(name):
    assert kv_bytes_per_token(model(name), "auto") == MODELS[name]["kv_bytes"]
    assert kv_bytes_per_token(model(name), "fp8") == MODELS[name]["kv_bytes"] // 2


def test_seven_billion_parameters_in_fp16_are_14_gigabytes():
    by_hand = plain(parameters=7_000_000_000, layers=32, heads=32, hidden=4096)
    assert weight_bytes(by_hand, "float16") == 14_000_000_000
    assert kv_bytes_per_token(by_hand, "float16") == MODELS["Llama-2-7b-hf"]["kv_bytes"]


def test_quantised_checkpoints_have_their_published_sizes():
    # The widely used 4-bit checkpoints of Llama-2-7B with groups of 128 are 3.89 GB (AWQ) and 3.90 GB (GPTQ).
    assert weight_bytes(model("Llama-2-7b-hf"), "awq") == pytest.approx(3.89e9, rel=0.003)
    # Llama-3.1-8B in fp8, embeddings in 16 bits: 9,081,280,648 bytes with its scales.
    assert weight_bytes(model("Meta-Llama-3-8B"), "fp8") == pytest.approx(9_081_280_648, rel=0.001)


def test_qlora_takes_4_127_bits_of_each_weight():
    # 0.127 bits for the constants is the figure of the QLoRA paper, section 3.
    linear = replace(model("Llama-2-7b-hf"), other_parameters=0)
    assert weight_bytes(linear, "nf4") * 8 / linear.parameters == pytest.approx(4.127, abs=0.0005)


def test_an_adapter_has_the_parameters_that_peft_makes():
    # 4,884,480: peft's own count for rank 16 on all linear layers of SmolLM2-135M.
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert adapter_parameters(model("SmolLM2-135M"), 16, targets) == 4_884_480
    # 270,336: rank 4 on queries and values of Qwen2.5-0.5B.
    assert adapter_parameters(model("Qwen2.5-0.5B"), 4, ("q_proj", "v_proj")) == 270_336


# --- what fits ---


def test_what_is_left_for_the_cache_is_what_nothing_else_takes():
    deployment = Deployment(gpu_bytes=GPUS["a100-80gb"], weights="bfloat16", requests=(Request(1000, 300),))
    (fit,) = fits(model("Meta-Llama-3-8B"), deployment, 1)
    taken = fit.weight_bytes + fit.adapter_bytes + fit.activation_bytes + fit.reserve_bytes + fit.cache_bytes
    assert taken == int(GPUS["a100-80gb"] * 0.9)
    assert fit.cache_tokens == fit.cache_bytes // (131_072 * 16) * 16
    assert fit.concurrent == (fit.cache_tokens // 16 // 82,)  # 1300 tokens are 82 blocks of 16.


def test_a_cache_of_8_bits_holds_twice_the_tokens():
    deployment = Deployment(gpu_bytes=GPUS["l4"], weights="bfloat16")
    whole, half = (fits(model("Mistral-7B-v0.1"), replace(deployment, kv_cache=k), 1)[0] for k in ("auto", "fp8"))
    assert half.cache_tokens == pytest.approx(2 * whole.cache_tokens, abs=16)


def test_70_billion_parameters_need_two_gpus_of_80_gigabytes():
    deployment = Deployment(gpu_bytes=GPUS["a100-80gb"], weights="bfloat16", requests=(Request(1000, 300),))
    found = fits(model("Meta-Llama-3-70B"), deployment, 8)
    assert [fit.tensor_parallel for fit in found] == [1, 2, 4, 8]
    assert found[0].cache_bytes < 0
    assert found[0].concurrent == (0,)
    chosen = smallest(found, deployment, 1)
    assert chosen is not None
    assert chosen.tensor_parallel == 2
    assert smallest(found, deployment, 100_000) is None


def test_key_value_heads_are_repeated_when_there_are_more_gpus():
    deployment = Deployment(gpu_bytes=GPUS["h100-80gb"], weights="bfloat16", utilisation=1.0, reserve_bytes=0)
    found = {fit.tensor_parallel: fit for fit in fits(model("Qwen2.5-7B"), deployment, 28)}
    assert set(found) == {1, 2, 4, 28}  # 28 heads and 4 key-value heads: 7 and 14 cannot share the latter.
    per_token = {degree: fit.cache_bytes / fit.cache_tokens for degree, fit in found.items()}
    assert per_token[4] == pytest.approx(57_344 / 4, rel=0.001)
    assert per_token[28] == pytest.approx(57_344 / 4, rel=0.001)


def test_adapters_take_from_the_cache():
    deployment = Deployment(gpu_bytes=GPUS["l4"], weights="bfloat16")
    without, beside = (fits(model("Mistral-7B-v0.1"), replace(deployment, adapters=n), 1)[0] for n in (0, 8))
    assert beside.adapter_bytes == 8 * 2 * adapter_parameters(model("Mistral-7B-v0.1"), 16, deployment.adapter_targets)
    assert without.cache_bytes - beside.cache_bytes == beside.adapter_bytes


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_a_cache_that_is_not_chosen_is_kept_as_the_weights_are(weights):
    # vLLM's `--kv-cache-dtype auto` is the type of the model.
    deployment = Deployment(gpu_bytes=GPUS["a100-80gb"], weights=weights)
    (fit,) = fits(model("Mistral-7B-v0.1"), deployment, 1)
    assert fit.token_bytes == kv_bytes_per_token(model("Mistral-7B-v0.1"), weights)
    planned = json.loads(run(*BY_HAND, "--weights", weights, "--json").stdout)
    assert planned["model"]["kv_bytes_per_token"] == MODELS["Llama-2-7b-hf"]["kv_bytes"] * (1 + (weights == "float32"))


# --- training ---


def test_full_training_has_sixteen_bytes_a_parameter():
    # ZeRO's example (Rajbhandari et al. 2020, section 3.1): 7.5 billion parameters need 120 GB of states.
    seven_and_a_half = plain(parameters=7_500_000_000, layers=32, heads=32, hidden=4096)
    need = needs(seven_and_a_half, Training("full"))
    assert need.weight_bytes + need.gradient_bytes + need.optimiser_bytes == 120_000_000_000
    shared = needs(seven_and_a_half, Training("full", gpus=64))
    assert shared.weight_bytes + shared.gradient_bytes + shared.optimiser_bytes == pytest.approx(1.9e9, rel=0.02)


def test_65_billion_parameters_train_on_48_gigabytes_by_qlora_only():
    # The claim of the QLoRA paper's abstract.
    config = {**MODELS["Llama-2-70b-hf"]["config"], "num_key_value_heads": 64, "intermediate_size": 22016}
    llama = read_config(config)
    assert llama.parameters == pytest.approx(65.2e9, rel=0.002)
    fit = {m: largest_batch(llama, Training(m, sequence_tokens=512), 48 * GIB) for m in ("full", "lora", "qlora")}
    assert fit["full"] == fit["lora"] == 0
    assert fit["qlora"] >= 1


def test_the_largest_batch_fits_and_one_more_does_not():
    mistral = model("Mistral-7B-v0.1")
    run_ = Training("lora", sequence_tokens=1024)
    batch = largest_batch(mistral, run_, GPUS["l4"])
    assert needs(mistral, replace(run_, batch=batch)).total_bytes <= GPUS["l4"]
    assert needs(mistral, replace(run_, batch=batch + 1)).total_bytes > GPUS["l4"]


def test_checkpointing_keeps_less():
    kept, again = (
        needs(model("Mistral-7B-v0.1"), Training("lora", checkpointing=c)).activation_bytes for c in (False, True)
    )
    assert again < kept / 5


# --- bad input ---


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_type": "dinosaur"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"intermediate_size": 10**400}, "intermediate_size"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "quantization_config"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantization_config"),
    ],
)
def test_a_config_that_cannot_be_counted_names_the_field(change, field):
    with pytest.raises(InvalidRequest) as caught:
        model("Llama-2-7b-hf", **change)
    assert caught.value.param == field


def test_a_quantised_checkpoint_is_planned_as_it_is_stored():
    assert model("Llama-2-7b-hf", quantization_config={"quant_method": "awq", "bits": 4}).quantised == "awq"
    four = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert model("Llama-2-7b-hf", quantization_config=four).quantised == "nf4"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--layers", "0"], "--layers"),
        (["--kv-heads", "5"], "--kv-heads"),
        (["--gpu", "abacus"], "--gpu"),
        (["--request", "long"], "--request"),
        (["--weights", "int3"], "--weights"),
        (["--utilisation", "1.2"], "--utilisation"),
        (["--kv-cache", "int4"], "--kv-cache"),
        (["--adapter-targets", "lm_head"], "--adapter-targets"),
        (["--batch", "0"], "--batch"),
        (["--request", "0+5"], "--request"),
    ],
)
def test_a_wrong_argument_is_told_by_name(arguments, named):
    done = run(*BY_HAND, *arguments)
    assert done.exit_code == 2, done.output
    assert f"`{named}`" in done.stderr


@pytest.mark.parametrize(
    ("option", "values", "range_"),
    [
        ("--parameters", ("inf", "nan", "1e300", "0.5"), "from 1 to 1e+15"),
        ("--layers", ("0", str(10**400)), "from 1 to 1e+15"),
        ("--gpu-memory-gib", ("inf", "nan", "1e300", "0"), "from 0.1 to 1e+06"),
        ("--reserve-gib", ("inf", "nan", "1e300", "-1"), "from 0 to 1e+06"),
        ("--utilisation", ("inf", "nan", "2", "0"), "from 0.01 to 1"),
        ("--adapters", ("-1", str(10**400)), "from 0 to 1e+15"),
        ("--adapter-rank", ("0", str(10**400)), "from 1 to 1e+15"),
        ("--batch", (str(10**400),), "from 1 to 1e+15"),
        ("--sequence-tokens", (str(10**400),), "from 1 to 1e+15"),
    ],
)
def test_a_number_out_of_its_range_is_told_the_range(option, values, range_):
    for value in values:
        done = run(*BY_HAND, option, value)
        assert done.exit_code == 2, (value, done.output)
        assert f"`{option}`: " in done.stderr
        assert f"is not {range_}." in done.stderr


def test_the_largest_numbers_that_are_taken_are_still_printed():
    most = str(10**15)
    numbers = {"--layers": most, "--heads": most, "--hidden": most, "--adapters": most, "--adapter-rank": most}
    numbers |= {"--batch": most, "--sequence-tokens": most, "--parameters": "1e15", "--gpu-memory-gib": "1e6"}
    done = run(*(part for pair in numbers.items() for part in pair))
    assert done.exit_code == 1, done.output
    assert "does not fit" in done.stdout


def test_numbers_by_hand_must_be_complete():
    done = run("--parameters", "7e9")
    assert done.exit_code == 2
    assert "`--layers`" in done.stderr


def test_a_config_that_is_no_json_is_told(tmp_path):
    for text in ("{", '{"model_type": ' + "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        done = run(tmp_path)
        assert done.exit_code == 2
        assert "is not JSON" in done.stderr


# --- the command and what engines are started with ---


def test_the_command_prints_tables_and_arguments(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODELS["Meta-Llama-3-8B"]["config"]))
    done = run(tmp_path, "--gpu", "l4", "--gpus", "2", "--request", "3000+500", "--kv-cache", "fp8", "--adapters", "4")
    assert done.exit_code == 0, done.output
    assert "8.03 billion parameters, 16.06 GB as bfloat16; cache 64 KiB a token" in done.stdout
    assert "text-generation-launcher --model-id MODEL --num-shard 1" in done.stdout
    assert "--lora-adapters" in done.stdout


def test_json_holds_the_whole_plan(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODELS["Meta-Llama-3-70B"]["config"]))
    done = run(tmp_path / "config.json", "--gpus", "4", "--json", "--model-id", "org/big")
    plan = json.loads(done.stdout)
    assert plan["model"]["weight_bytes"] == 141_107_412_992
    assert plan["serving"]["tensor_parallel"] == 2
    assert plan["serving"]["replicas"] == 2
    assert plan["serving"]["vllm"][:3] == ["vllm", "serve", "org/big"]
    assert {row["method"]: row["fits"] for row in plan["training"]} == {"lora": True, "qlora": True, "full": False}


def test_what_does_not_fit_exits_with_1():
    done = run(*BY_HAND, "--gpu", "t4", "--weights", "float16")
    assert done.exit_code == 1
    assert "does not fit" in done.stdout


def test_arguments_say_what_was_planned():
    deployment = Deployment(
        gpu_bytes=GPUS["l4"],
        weights="awq",
        kv_cache="fp8",
        requests=(Request(1000, 300), Request(6000, 200)),
        adapters=2,
        adapter_rank=24,
    )
    (fit,) = fits(model("Mistral-7B-v0.1"), deployment, 1)
    tgi = shlex.join(tgi_arguments(deployment, fit, "m") or [])
    assert "--quantize awq" in tgi
    assert "--dtype" not in tgi  # TGI takes either of the two.
    assert "--max-input-tokens 6000 --max-total-tokens 6200 --max-batch-prefill-tokens 6000" in tgi
    assert f"--max-batch-total-tokens {fit.cache_tokens}" in tgi
    assert "--kv-cache-dtype fp8_e4m3fn" in tgi
    vllm = shlex.join(vllm_arguments(deployment, fit, "m") or [])
    assert "--max-model-len 6200" in vllm
    assert f"--max-num-seqs {fit.concurrent[1]}" in vllm
    assert "--max-loras 2 --max-lora-rank 32 --enable-lora" in vllm


@pytest.mark.parametrize("utilisation", [0.75, 0.83, 0.9, 0.95])
def test_tgi_has_the_cache_that_it_is_started_with(utilisation):
    """TGI's own sum: what is free beside all but `fraction x 0.90` of the GPU, after loading and one prefill."""
    requests = (Request(1000, 300), Request(200, 100))
    deployment = Deployment(gpu_bytes=GPUS["l4"], weights="bfloat16", requests=requests, utilisation=utilisation)
    (fit,) = fits(model("Meta-Llama-3-8B"), deployment, 1)
    words = tgi_arguments(deployment, fit, "m") or []
    given = {name: float(value) for name, value in pairwise(words) if name.startswith(("--cuda", "--max"))}
    taken = fit.weight_bytes + fit.activation_bytes + fit.reserve_bytes
    held = int(given["--cuda-memory-fraction"] * 0.9 * deployment.gpu_bytes - taken) // fit.token_bytes
    assert given["--max-batch-total-tokens"] == pytest.approx(held, abs=16)
    assert given["--max-batch-total-tokens"] <= fit.cache_tokens
    # It does not start where these are more than that.
    assert given["--max-batch-prefill-tokens"] <= held
    assert given["--max-total-tokens"] <= held


def test_tgi_is_not_started_where_it_has_no_room_for_what_vllm_holds(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODELS["Meta-Llama-3-8B"]["config"]))
    small = ("--gpu-memory-gib", "18.3", "--utilisation", "0.95")
    done = run(tmp_path, *small)
    assert done.exit_code == 0, done.output
    assert "TGI takes no more than 0.9 of a GPU: 0 tokens in its cache" in done.stdout
    assert "tgi has no room for the longest request" in done.stdout
    assert "vllm serve MODEL" in done.stdout
    assert json.loads(run(tmp_path, *small, "--json").stdout)["serving"]["tgi_cache_tokens"] == 0


def test_tgi_records_no_graphs_where_it_has_adapters():
    deployment = Deployment(gpu_bytes=GPUS["a100-80gb"], weights="bfloat16", adapters=2)
    (fit,) = fits(model("Mistral-7B-v0.1"), deployment, 1)
    assert ("--cuda-graphs", "0") in pairwise(tgi_arguments(deployment, fit, "m") or [])
    assert "--cuda-graphs" not in (tgi_arguments(replace(deployment, adapters=0), fit, "m") or [])


def test_weights_an_engine_cannot_load_have_no_arguments():
    deployment = Deployment(gpu_bytes=GPUS["l4"], weights="int8")
    (fit,) = fits(model("Mistral-7B-v0.1"), deployment, 1)
    assert vllm_arguments(deployment, fit, "m") is None
    assert tgi_arguments(replace(deployment, weights="float32"), fit, "m") is None
