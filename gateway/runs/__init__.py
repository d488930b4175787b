"""The hot path: one run of an agent.

=============  =========================================================================================
`requests`     what is asked for and what is answered, whatever the dialect
`runner`       begins runs, carries them out, hands them over
`active`       a run under way, as its client sees it
`line`         the line for a session's turn, over all web processes
`sessions`     the session's turn and its history
`history`      a conversation as the model is to see it
`execution`    one run in the SDK, with its model (`models`, `offline`) and its errors as ours
`items`        what a run does, as items and events of the Responses API
`pauses`       runs that wait for a person's decision
`responses`    stored answers
`idempotency`  answers that are given again
=============  =========================================================================================

A turn is committed only if its run succeeded. What a run costs beyond the SDK's own work is what this folder is judged
by.
"""
