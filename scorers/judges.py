"""MLflow's own judges: a language model reads the turn, or the conversation, and grades it.

No judge names a model: each takes the one of `MLFLOW_GENAI_JUDGE_DEFAULT_MODEL`, so one file serves every deployment.
Their values are "yes" and "no", but for `user_frustration`: "none", "resolved" or "unresolved".
"""

from mlflow.genai.scorers import (
    ConversationCompleteness,
    KnowledgeRetention,
    ToolCallCorrectness,
    ToolCallEfficiency,
    UserFrustration,
)

# One turn: they read the trace.
tool_call_correctness = ToolCallCorrectness()
tool_call_efficiency = ToolCallEfficiency()

# A whole conversation: they read the session.
conversation_completeness = ConversationCompleteness()
user_frustration = UserFrustration()
# Asks the judge once a turn, so its cost grows with the length of the conversation; the others ask once.
knowledge_retention = KnowledgeRetention()
