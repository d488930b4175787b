"""What judges may spend, and the one way out by which they spend it.

A judge is somebody else's code: it asks a language model as often as it likes, retries by itself, and runs in a thread
that nobody can stop. So its calls are counted and bounded where they leave:

``leases``     what one scoring may spend and has spent
``binding``    ties each HTTP call of a judge to the scoring that it belongs to
``providers``  which way the calls of a model take
``litellms``   how those of LiteLLM's providers get to the relay, and out of it
``relay``      the local server that all calls go through
``upstream``   one call: retries, backoff, deadline, what it used
``wire``       how requests and answers look on the way
``limits``     concurrency and request rate of a model, over all workers
``breaker``    leaves a model alone that is down
``prices``     what a call costs
``budget``     from what was spent to the share that is still judged; pure
``spending``   what all workers spent, by the hour, and the share that follows from it

`relay.Relay` is the part that the evaluator starts; `spending.BudgetKeeper` is the one that it asks for the share.
"""
