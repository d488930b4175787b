"""From a run that has ended to what is stored of it: assembled, judged by the tail rules, redacted, encrypted."""

import structlog

from gateway.crypto import Cipher
from gateway.reloading import LiveSettings
from gateway.tracing.capture import RunCapture, assemble, outcome
from gateway.tracing.handover.storing import FinishedRun
from gateway.tracing.redaction.redactor import Redactor
from gateway.tracing.sampling import Draw, rules_met
from gateway.tracing.spans import Outcome, encode

log = structlog.get_logger(__name__)

_BLOCKED = "RUN_BLOCKED"  # code of the error by which a tripped guardrail ends a run


class Preparer:
    """Prepares the runs of one web process. Holds no state of its own: any thread may use it."""

    def __init__(self, redactor: Redactor, cipher: Cipher, live: LiveSettings, *, process_id: int):
        self._redactor = redactor
        self._cipher = cipher
        self._live = live
        self._process_id = process_id

    def prepare(self, run: RunCapture, draw: Draw) -> FinishedRun:
        """Return what is stored of a run. Raises nothing: a trace that the redactor fails on is withheld."""
        if not run.sampled:
            return self._finished(run, draw, None, None)
        trace_id = run.trace.trace_id
        try:
            trace = assemble(run)
            known = outcome(trace)
            payload = self._cipher.encrypt(encode(self._redactor.trace(trace)), trace_id)
        except Exception as error:  # noqa: BLE001 - fails closed: whatever it was, the text stays in
            log.error("a trace was withheld", trace_id=trace_id, error=type(error).__name__)
            return self._finished(run, draw, _known(run), None)
        return self._finished(run, draw, known, payload)

    def _finished(self, run: RunCapture, draw: Draw, known: Outcome | None, payload: bytes | None) -> FinishedRun:
        trace = run.trace
        # Of what was not captured nothing can be kept: no rule is to say that it is.
        rules = rules_met(self._live.now, trace.agent, known, asked=draw.asked) if known else ()
        withheld = "redaction_blocked" if run.sampled else "sampled_out"
        return FinishedRun(
            trace_id=trace.trace_id,
            agent=trace.agent,
            agent_version=trace.agent_version,
            session_id=trace.session_id,
            user_id=trace.user_id,
            key_id=trace.key_id,
            process_id=self._process_id,
            failed=trace.error is not None,
            offline=trace.offline,
            started_ns=trace.started_ns,
            duration_ms=trace.duration_ms,
            rate=draw.rate,
            drawn=draw.drawn,
            rules=list(rules),
            state=withheld if payload is None else "pending",  # type: ignore[arg-type]
            payload=payload,
        )


def _known(run: RunCapture) -> Outcome:
    """Return what is known of a run whose spans may not all be there."""
    known, error = outcome(run.trace), run.trace.error
    return known._replace(
        tool_failed=known.tool_failed or bool(run.tool_errors),
        guardrail_tripped=known.guardrail_tripped or (error is not None and error.type == _BLOCKED),
    )
