"""Why fields of a LiteLLM proxy's file are not used, and what there is here instead.

Many a file states what would be so without it (`set_verbose: false`): that is no loss, and is not told.
"""

from collections.abc import Mapping

from tokenmill import env
from tokenmill.engine.gateway.foreign_file import ForeignFile
from tokenmill.engine.gateway.litellm_deployments import DROPS
from tokenmill.engine.gateway.yaml_file import Place

#: Of all keys together, there.
_BUDGETS = ("max_budget", "budget_duration", "max_internal_user_budget", "max_end_user_budget")
_REDIS = "workers share limits through the store, no Redis is needed"
_SLACK = "nobody is told when something goes wrong; the dashboard, /admin/metrics and the log show it"

_SECTIONS: Mapping[str, Mapping[str, str]] = {
    "litellm_settings": {
        "drop_params": DROPS,
        "set_verbose": "set the variable TOKENMILL_LOG_LEVEL=debug instead",
        **dict.fromkeys(
            ("cache", "cache_params", "enable_caching_on_provider_specific_optional_params"), "there is no cache here"
        ),
        "master_key": "it belongs into general_settings; without one there everybody may ask for everything",
        "telemetry": "nothing is told to anybody",
        "turn_off_message_logging": "prompts stand in no ledger, log or trace",
        "modify_params": "every field passes to the backend untouched",
        "num_retries_per_request": "`num_retries` is that of a request",
        "return_response_headers": "headers of answers pass, but for those that speak of the backend's own host",
        "max_parallel_requests": "it belongs into general_settings, or into a deployment's litellm_params",
    },
    "router_settings": {
        "master_key": "it belongs into general_settings; without one there everybody may ask for everything",
        **dict.fromkeys(("redis_host", "redis_port", "redis_password", "redis_url", "redis_db"), _REDIS),
        "enable_pre_call_checks": "`rpm` and `tpm` always count, `max_input_tokens` decides about "
        "`context_window_fallbacks`",
        "retry_policy": "`num_retries` counts for every kind of failure",
        "allowed_fails_policy": "`allowed_fails` counts for every kind of failure",
        "retry_after": "another backend is asked at once",
        "stream_timeout": "`timeout` is the longest silence of streams, too",
        "cache_responses": "there is no cache here",
        "routing_strategy_args": "shares follow the weights, and open requests",
        "enable_tag_filtering": "requests are not routed by tags; give each kind a model_name of its own",
    },
    "general_settings": {
        "database_url": f"keys and books are kept in a file beside this one, or where {env.STORE.name} says; "
        "LiteLLM's tables are others",
        **dict.fromkeys(
            ("database_connection_pool_limit", "database_connection_timeout", "proxy_batch_write_at"),
            f"of LiteLLM's database; keys and books are kept where {env.STORE.name} says",
        ),
        "store_model_in_db": "models are those of this file",
        "store_prompts_in_spend_logs": "prompts stand in no ledger, log or trace",
        **dict.fromkeys(
            ("custom_auth", "enable_jwt_auth"),
            "keys are checked here, where there is a master_key; without one everybody may ask for everything",
        ),
        **dict.fromkeys(("background_health_checks", "health_check_interval"), "backends are always watched"),
        **dict.fromkeys(("alerting", "alerting_threshold", "alert_types", "alert_to_webhook_url"), _SLACK),
        "pass_through_endpoints": "only the API's own paths are passed on",
    },
}
_NO_BUDGET = "no budget binds all keys together here; give one to each key or team"
#: Whose `false` is not what holds here.
_ALWAYS = frozenset({"enable_pre_call_checks", "background_health_checks"})
#: Of its guardrail, or callback.
PRESIDIO = (
    "requests are not checked by it; write a `sensitivity` section, in our own format, which finds and replaces "
    "personal data without Presidio"
)
_GUARDRAIL = "requests are not checked by it; there are no guardrails of other services here"


def leave(source: ForeignFile) -> None:
    """Says of each field that is not used why, if there is more to say than that it is not understood."""
    for section, fields in _SECTIONS.items():
        for name, reason in fields.items():
            _leave(source, (section, name), reason)
    for section in ("litellm_settings", "general_settings"):
        for name in _BUDGETS:
            _leave(source, (section, name), _NO_BUDGET)
    _leave(source, ("mcp_servers",), "tools of MCP servers are not served")
    for name in ("policies", "policy_attachments"):
        _leave(source, (name,), _GUARDRAIL)
    for place in (("guardrails",), ("litellm_settings", "guardrails")):
        for index in source.keys(place):
            presidio = "presidio" in str(source.peek((*place, index))).lower()
            source.leave((*place, index), PRESIDIO if presidio else _GUARDRAIL)


def _leave(source: ForeignFile, place: Place, reason: str) -> None:
    value = source.peek(place)
    if value is False and place[-1] not in _ALWAYS:
        source.raw(place)
    elif value is not None:
        source.leave(place, reason)
