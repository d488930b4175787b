"""Offline evaluation: the same agents and the same scorers on stored questions, before a version goes live.

``rows`` reads what is to be asked, ``replay`` stands in for tools that cannot be called again, ``mlflows`` knows where
MLflow is, ``selection`` which scorers apply. ``evaluate`` runs it all by ``mlflow.genai.evaluate``, with
``conversations`` for the scorers that want more than one turn; ``cases`` says what came of each row and ``kept`` reads
what earlier runs logged. ``gate`` decides whether that is good enough, ``deciding`` does both from end to end, and
``reporting`` tells people and machines.
"""
