from prometheus_client.parser import text_string_to_metric_families

from app.engines.local.metrics import Metrics


def test_the_exposition_is_read_by_prometheus() -> None:
    metrics = Metrics()
    metrics.received()
    metrics.failed("dropped")
    metrics.finished(queue_seconds=0.001, inference_seconds=2.0, tokens=4, prompt_tokens=30)
    text = metrics.render(queue_size=3, batch_size=2)
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["tgi_queue_size",] == 3
    assert samples["tgi_batch_current_size",] == 2
    assert 'tgi_request_failure{err="dropped"} 1' in text.splitlines()
    assert "tgi_request_count 1" in text.splitlines()
    assert samples["tgi_request_duration_sum",] == 2.001
    assert samples["tgi_request_mean_time_per_token_duration_sum",] == 0.5
    assert samples["tgi_request_input_length_bucket", "16.0"] == 0
    assert samples["tgi_request_input_length_bucket", "32.0"] == 1
    assert samples["tgi_request_input_length_bucket", "+Inf"] == 1
