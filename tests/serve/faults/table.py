"""All 75 rows of faults and bad inputs, and where each is shown.

Rows with a check are done to a server by its URL: to our own in tests/serve/test_faults.py (a tiny model) and
test_faults_clients.py (an engine that only emits), to anybody's by scripts/faults.py.  The others need hands on
processes, files or the device; their tests are named here.
"""

from collections.abc import Iterator
from dataclasses import replace

from tests.serve.faults import access, clients, media, texts, values
from tests.serve.faults.clients import Watch
from tests.serve.faults.row import Row
from tests.serve.faults.target import Target

LAST = 75  # row that is judged when all is over

OURS = [
    Row(
        52,
        "a KV cache smaller than the demand",
        "preempted, the same greedy answers",
        tests=(
            "serve/test_faults_engine.py::test_52_a_cache_that_is_too_small_costs_no_token",
            "engine/test_engine.py::test_preempted_equals_oracle",
        ),
    ),
    Row(
        53,
        "one request larger than the KV cache",
        "400 at admission",
        tests=(
            "serve/test_faults_engine.py::test_53_a_request_larger_than_the_cache",
            "engine/test_engine.py::test_a_request_that_can_never_fit_is_refused",
        ),
    ),
    Row(
        54,
        "a time limit",
        "504, KV freed",
        tests=(
            "serve/test_faults_engine.py::test_54_a_time_limit",
            "serve/test_door.py::test_a_request_has_a_time_limit",
        ),
    ),
    Row(
        55,
        "SIGTERM with 32 live streams",
        "503 at once, streams finish, status 0",
        tests=("serve/test_run.py::test_a_signal_lets_streams_end",),
    ),
    Row(
        56,
        "a second SIGTERM or SIGINT",
        "at once; no process, and so no device memory, is left",
        tests=("serve/test_run.py::test_a_second_signal_stops_at_once",),
    ),
    Row(
        57,
        "kill -9 of the engine",
        "an error event, /health 503, started again",
        tests=(
            "serve/test_run.py::test_a_killed_engine_comes_back",
            "serve/test_run.py::test_an_engine_that_dies_too_often_ends_the_server",
        ),
    ),
    Row(
        58,
        "kill -STOP of the engine",
        "reported, requests are refused, recovers on CONT",
        tests=("serve/test_run.py::test_a_stopped_engine_is_reported_and_recovers",),
    ),
    Row(
        59,
        "kill -9 of one web process",
        "only its streams die, the engine frees them",
        tests=("serve/test_run.py::test_a_killed_web_process_takes_only_its_own_streams",),
    ),
    Row(
        60,
        "kill of one of several devices' ranks",
        "fails fast as a whole",
        # There are no ranks: one process has all devices.  What is left is its end, and steps that fail.
        tests=(
            "serve/test_faults_process.py::test_60_an_engine_of_two_devices_is_one_process",
            "engine/test_faults.py::test_three_times_in_a_row_end_the_engine",
        ),
    ),
    Row(
        61,
        "out of memory on the device in one step",
        "the newest get a 503, the engine goes on",
        tests=(
            "serve/test_faults_engine.py::test_61_out_of_memory",
            "engine/test_faults.py::test_out_of_memory_makes_steps_smaller",
            "engine/test_faults.py::test_out_of_memory_twice_fails_the_newest",
        ),
    ),
    Row(
        62,
        "an exception for one row of a step",
        "only that row fails",
        tests=(
            "serve/test_faults_engine.py::test_62_a_row_that_raises_fails_alone",
            "engine/test_faults.py::test_a_request_that_cannot_be_packed_fails_alone",
            "engine/test_guided.py::test_a_matcher_that_fails_fails_its_row_only",
        ),
    ),
    Row(
        63,
        "logits that are no numbers",
        "that row fails, and is counted",
        tests=(
            "serve/test_faults_engine.py::test_63_logits_that_are_no_numbers",
            "engine/test_faults.py::test_not_a_number_is_counted",
        ),
    ),
    Row(
        64,
        "port in use, no GPU, wrong tp",
        "one line, status not 0, in 10 s",
        tests=(
            "serve/test_run.py::test_a_port_in_use",
            "serve/test_run.py::test_what_cannot_be_served_is_one_line",
        ),
    ),
    Row(
        65,
        "a model folder that is missing, empty, without tokenizer, of unknown architecture",
        "one line that names it",
        tests=("serve/test_run.py::test_what_is_no_model",),
    ),
    Row(
        66,
        "safetensors: truncated, huge header, overlap, wrong shape, NaN",
        "refused by the tensor's name",
        tests=(
            "serve/test_faults_models.py::test_66_weights",
            "checkpoint/test_safetensors.py::test_a_truncated_file_names_the_tensor",
            "checkpoint/test_safetensors.py::test_a_header_that_lies_is_refused",
            "checkpoint/test_safetensors.py::test_a_header_length_that_lies_is_refused",
            "test_weights.py::test_a_wrong_shape",
        ),
    ),
    Row(
        67,
        "a checkpoint of .bin or .pt files only",
        "refused, with what to do",
        tests=("checkpoint/test_safetensors.py::test_pickles_are_refused_with_the_reason",),
    ),
    Row(
        68,
        "an absurd config.json (hidden 2^31, layers -1, auto_map)",
        "refused, no code run",
        tests=(
            "serve/test_faults_models.py::test_68_configs",
            "serve/test_faults_models.py::test_68_code_in_a_folder_is_not_run",
            "models/test_config.py::test_what_is_not_computed_is_refused",
        ),
    ),
    Row(
        69,
        "tokenizer.json of 500 MB or damaged, a template with __class__",
        "refused; 400",
        tests=(
            "serve/test_faults_models.py::test_69_tokenizers",
            "serve/test_faults_models.py::test_69_templates",
            "text/test_source.py::test_a_huge_file_is_not_read",
            "text/test_jinja.py::test_refusals",
            "text/test_jinja.py::test_a_template_ends",
        ),
    ),
    Row(
        70,
        "GGUF with offsets or counts that lie",
        "refused",
        tests=(
            "checkpoint/test_gguf.py::test_counts_that_lie_are_refused_at_once",
            "checkpoint/test_gguf.py::test_tensor_offsets_that_lie",
            "checkpoint/test_gguf.py::test_damaged_heads_never_do_worse_than_an_error",
            "checkpoint/test_gguf.py::test_a_truncated_file_is_refused_wherever_it_ends",
        ),
    ),
    Row(
        71,
        "a full disk while converting, quantizing or logging, a cache that cannot be written",
        "a clean error, nothing half done",
        tests=(
            "serve/test_faults_process.py::test_71_a_full_disk_for_the_log",
            "checkpoint/test_orbax.py::test_nothing_is_overwritten_and_nothing_half_done_stays",
            "lite/test_folder.py::test_a_full_disk_leaves_nothing_half_done",
            "engine/test_programs.py::test_a_full_disk_leaves_nothing_behind",
            "engine/test_programs.py::test_a_folder_that_cannot_be_written_costs_only_time",
            "test_hub.py::test_a_full_disk_leaves_nothing",
        ),
    ),
    Row(
        74,
        "4 hours of a random mix, 30 % aborts, 10 % bad requests",
        "no leak",
        # In hours by scripts/soak.py --minutes 240; CI has the first minute of it.
        tests=("serve/test_soak.py::test_the_server_is_afterwards_what_it_was",),
    ),
]

ROWS = sorted([*values.ROWS, *texts.ROWS, *media.ROWS, *access.ROWS, *clients.ROWS, *OURS], key=lambda row: row.number)


def checks(*, limit: int | None, watch: Watch, schemas: int = 10_000, secrets: int = 10_000) -> Iterator[Row]:
    """The rows that can be done by a URL, in their order.

    limit: requests that the server takes at once, where that is known.  schemas, secrets: requests of rows 31 and 72.
    """
    given = {LAST: watch.check}
    if limit is not None:
        given[51] = lambda target: clients.burst(target, limit)
    given[31] = lambda target: texts.distinct(target, schemas)
    given[72] = lambda target: clients.secrets(target, secrets)
    for row in ROWS:
        row = replace(row, check=given.get(row.number, row.check))
        if row.check is not None:
            yield row


def chosen(numbers: str) -> set[int]:
    """ "1,5,30-35" as numbers of rows."""
    found: set[int] = set()
    for part in numbers.split(","):
        begin, _, end = part.partition("-")
        found.update(range(int(begin), int(end or begin) + 1))
    return found


__all__ = ["LAST", "ROWS", "Target", "Watch", "checks", "chosen"]
