"""What is not shown of what others say."""

import logging

from eval.logs import unsaid


def test_only_what_is_named_is_not_shown(caplog):
    other = logging.getLogger("other")
    with unsaid("other", "--option", "ready"):
        other.warning("use --%s", "option")
        other.warning("it is ready")
        other.warning("memory is low")
    other.warning("use --option")
    assert caplog.messages == ["memory is low", "use --option"]
    with unsaid("other"):
        other.warning("anything")
    assert caplog.messages[-1] == "anything"
