import json
import logging
from pathlib import Path

import pytest

from jaxserve.config import ChatTemplateConfig
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tools import internlm2 as internlm2_calls

GOLDEN = json.loads((Path(__file__).parents[1] / "data/smollm2_golden.json").read_text())
INTERNLM2 = {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"]}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
META = (
    "<|im_start|>system\nYou are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
    "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as "
    "English and 中文.\n<|im_end|>\n"
)
ADD = {
    "name": "add",
    "description": "Compute the sum of two numbers 和",
    "parameters": {"type": "object", "properties": {"a": {"type": "int"}}, "required": ["a"]},
}
ADD_SHOWN = (
    '[{"description": "Compute the sum of two numbers 和", "name": "add", '
    '"parameters": {"type": "object", "properties": {"a": {"type": "int"}}, "required": ["a"]}}]'
)
TOOLS = [{"type": "function", "function": ADD}]
PLUGIN = f"<|im_start|>system name=<|plugin|>\n{ADD_SHOWN}<|im_end|>\n"
REPLY = "<|im_start|>assistant\n"


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


@pytest.fixture(scope="module")
def internlm2(spm):
    return ChatTemplate.for_model(INTERNLM2, spm)


def with_template(tokenizer, default=None, **named):
    """The same tokenizer with other chat templates."""
    return Tokenizer(
        tokenizer.core,
        tokenizer.named,
        tokenizer.bos_ids,
        tokenizer.eos_ids,
        {"default": default} | named if default else named,
    )


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["prompt"][:20])
def test_default_model(smollm2, case):
    template = ChatTemplate.for_model(LLAMA, smollm2)
    assert template.encode([user(case["prompt"])]) == template.encode(case["prompt"]) == case["prompt_ids"]
    assert template.stop_words == ("<|im_end|>",) and not template.takes_tools


# --- InternLM2's, byte for byte


def test_internlm2_question(internlm2):
    question = "<|im_start|>user\n上海是<|im_end|>\n"
    assert internlm2.render("上海是") == internlm2.render([user("上海是")]) == META + question + REPLY
    assert internlm2.render([user("上海是")], add_generation_prompt=False) == META + question
    assert internlm2.stop_words == ("<|im_end|>", "<|action_end|>") and internlm2.takes_tools


def test_internlm2_turns(internlm2):
    rendered = internlm2.render([system("Be brief."), user("a"), assistant("b"), user("c")])
    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )


def test_internlm2_continues_the_last_reply(internlm2):
    messages = [user("a"), assistant("It is ")]
    asked = META + "<|im_start|>user\na<|im_end|>\n"
    assert internlm2.render(messages) == asked + "<|im_start|>assistant\nIt is "
    assert internlm2.render(messages, add_generation_prompt=False) == asked + (
        "<|im_start|>assistant\nIt is <|im_end|>\n"
    )
    assert internlm2.render([user("a"), assistant("")]) == asked + REPLY


def test_internlm2_tools(internlm2):
    question = "<|im_start|>user\nCompute 3+5<|im_end|>\n"
    assert internlm2.render([user("Compute 3+5")], TOOLS) == META + PLUGIN + question + REPLY
    own = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert internlm2.render([system("Be brief."), user("Compute 3+5")], TOOLS) == own + PLUGIN + question + REPLY
    assert internlm2.render([user("Compute 3+5")], [ADD]) == META + PLUGIN + question + REPLY
    bare = internlm2.render([user("x")], [{"type": "function", "function": {"name": "now"}}])
    assert '\n[{"description": null, "name": "now", "parameters": null}]<|im_end|>' in bare


def test_internlm2_results_of_tools(internlm2):
    call = '<|action_start|><|plugin|>\n{"name": "add", "parameters": {"a": 3}}<|action_end|>'
    result = "<|im_start|>environment name=<|plugin|>\n3+5=8<|im_end|>\n"
    asked = META + PLUGIN + "<|im_start|>user\nx<|im_end|>\n"
    done = asked + f"<|im_start|>assistant\nI add. {call}<|im_end|>\n" + result + REPLY
    said = assistant("I add. " + call)
    environment = {"role": "environment", "name": "plugin", "content": "3+5=8"}
    assert internlm2.render([user("x"), said, environment], TOOLS) == done
    calls = [{"id": "0", "type": "function", "function": {"name": "add", "arguments": '{"a": 3}'}}]
    tool = {"role": "tool", "tool_call_id": "0", "content": "3+5=8"}
    assert internlm2.render([user("x"), assistant("I add. ", tool_calls=calls), tool], TOOLS) == done
    silent = internlm2.render([user("x"), assistant(None, tool_calls=calls), tool], TOOLS)
    assert silent == done.replace("I add. ", "")


# The function calling script of InternLM's course, as it stands there: 'int' is no type of JSON Schema, the call is not
# sent back with the reply, and the result has the role "environment".
COURSE = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Compute the {result} of two numbers",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "int", "description": "A number"},
                    "b": {"type": "int", "description": "A number"},
                },
                "required": ["a", "b"],
            },
        },
    }
    for name, result in (("add", "sum"), ("mul", "product"))
]
COURSE_ASKED = (
    META + "<|im_start|>system name=<|plugin|>\n"
    '[{"description": "Compute the sum of two numbers", "name": "add", "parameters": {"type": "object", "properties": '
    '{"a": {"type": "int", "description": "A number"}, "b": {"type": "int", "description": "A number"}}, '
    '"required": ["a", "b"]}}, '
    '{"description": "Compute the product of two numbers", "name": "mul", "parameters": {"type": "object", '
    '"properties": {"a": {"type": "int", "description": "A number"}, "b": {"type": "int", "description": "A number"}}, '
    '"required": ["a", "b"]}}]<|im_end|>\n'
    "<|im_start|>user\nCompute (3+5)*2<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@pytest.mark.parametrize("content", ["", None])
def test_the_courses_function_calls(internlm2, content):
    """Two steps against a model that says what it should: 8, then 16."""
    says = [
        '<|action_start|><|plugin|>\n{"name": "add", "parameters": {"a": 3, "b": 5}}',
        '<|action_start|><|plugin|>\n{"name": "mul", "parameters": {"a": 8, "b": 2}}',
    ]
    functions = {"add": lambda a, b: a + b, "mul": lambda a, b: a * b}
    messages = [user("Compute (3+5)*2")]
    prompts, ids, results = [], [], []
    for said in says:
        prompts.append(internlm2.render(messages, COURSE))
        call, arguments = internlm2_calls.Parser(COURSE, whole=True).feed(said)
        ids.append(call.id)
        results.append(functions[call.name](**json.loads(arguments.text)))
        messages.append(assistant(content))
        messages.append({"role": "environment", "content": f"3+5={results[-1]}", "name": "plugin"})
    assert (ids, results) == (["0", "1"], [8, 16])
    assert prompts[0] == COURSE_ASKED
    assert prompts[1] == COURSE_ASKED + (
        "<|im_end|>\n<|im_start|>environment name=<|plugin|>\n3+5=8<|im_end|>\n<|im_start|>assistant\n"
    )


def test_internlm2_names(internlm2):
    rendered = internlm2.render([system("s") | {"name": "interpreter"}, user("u") | {"name": "Ann"}])
    assert rendered == ("<|im_start|>system name=<|interpreter|>\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n" + REPLY)
    plain = internlm2.render([user("u"), {"role": "environment", "content": "e"}])
    assert plain.endswith("<|im_start|>environment\ne<|im_end|>\n" + REPLY)


def test_internlm2_ids_begin_with_one_bos(internlm2, spm):
    ids = internlm2.encode("the sea")
    assert ids[0] == spm.bos_id and ids.count(spm.bos_id) == 1
    assert spm.decode(ids[1:]) == internlm2.render("the sea")


def test_internlm2_goes_before_the_checkpoints_own(smollm2):
    assert ChatTemplate.for_model(INTERNLM2, smollm2).render("x") == META + "<|im_start|>user\nx<|im_end|>\n" + REPLY


def test_internlm2_meta_instruction(spm):
    changed = ChatTemplate.for_model(INTERNLM2, spm, meta_instruction="Be kind.")
    asked = "<|im_start|>user\nx<|im_end|>\n" + REPLY
    assert changed.render("x") == "<|im_start|>system\nBe kind.<|im_end|>\n" + asked
    by_name = ChatTemplateConfig(model_name="internlm2-chat-7b", meta_instruction="Be kind.", user="<U>")
    assert ChatTemplate.for_model(LLAMA, spm, by_name).render("x") == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<U>x<|im_end|>\n" + REPLY
    )


# --- files and names in place of the checkpoint's template

JSON = {
    "model_name": "mine",
    "system": "[S]",
    "meta_instruction": "Help.",
    "eosys": "[/S]\n",
    "user": "[U]",
    "eoh": "[/U]\n",
    "assistant": "[A]",
    "eoa": "[/A]",
    "separator": "\n",
    "capability": "chat",
    "stop_words": ["[/A]"],
}


def test_json_file(smollm2, tmp_path):
    file = tmp_path / "template.json"
    file.write_text(json.dumps(JSON))
    template = ChatTemplate.for_model(LLAMA, smollm2, file)
    assert template.render([user("a"), assistant("b"), user("c")]) == (
        "[S]Help.[/S]\n[U]a[/U]\n[A]b[/A]\n[U]c[/U]\n[A]"
    )
    assert template.render([system("s"), assistant("b")]) == "[S]s[/S]\n[A]b"
    assert template.stop_words == ("[/A]",)
    with pytest.raises(ValueError, match="message 1: the role 'judge' is none of system, user, assistant"):
        template.render([user("x"), {"role": "judge", "content": "y"}])


def test_bos_is_not_doubled(spm, tmp_path):
    file = tmp_path / "template.json"
    file.write_text(json.dumps({"user": "<s>[INST] ", "eoh": " [/INST]"}))
    ids = ChatTemplate.for_model(LLAMA, spm, str(file)).encode("sea")
    assert ids == spm.encode("<s>[INST] sea [/INST]", bos=False) and ids.count(spm.bos_id) == 1
    own = with_template(spm, "{{ bos_token }}{{ messages[0].content }}")
    assert ChatTemplate.for_model(LLAMA, own).encode("sea") == spm.encode("<s>sea", bos=False)


def test_jinja_file(smollm2, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ eos_token }}")
    template = ChatTemplate.for_model(INTERNLM2, smollm2, str(file), meta_instruction="Be kind.")
    assert template.render("a") == "system: Be kind.\nuser: a\n<|im_end|>"
    assert template.render([system("s"), user("a")]) == "system: s\nuser: a\n<|im_end|>"
    file.write_text("{% if")
    with pytest.raises(ValueError, match=r"template\.jinja is no jinja template: line 1"):
        ChatTemplate.for_model(LLAMA, smollm2, str(file))


def test_what_cannot_be_a_template(smollm2, tmp_path):
    with pytest.raises(ValueError, match="'nowhere.jinja' is no file, and not internlm2 or base"):
        ChatTemplate.for_model(LLAMA, smollm2, "nowhere.jinja")
    with pytest.raises(ValueError, match="'internlm2/x.jinja' is no file"):
        ChatTemplate.for_model(LLAMA, smollm2, "internlm2/x.jinja")
    (tmp_path / "x.json").write_text('{"users": 1}')
    with pytest.raises(ValueError, match=r"x\.json.*users"):
        ChatTemplate.for_model(LLAMA, smollm2, tmp_path / "x.json")
    with pytest.raises(ValueError, match="the capability 'python' is not there"):
        ChatTemplate.for_model(LLAMA, smollm2, ChatTemplateConfig(capability="python"))


def test_builtin_by_name(smollm2):
    assert ChatTemplate.for_model(LLAMA, smollm2, "internlm2").render("x").startswith(META)
    assert ChatTemplate.for_model(INTERNLM2, smollm2, "base").render([user("a"), assistant("b")]) == "ab"


def test_completion_means_no_template(spm, smollm2):
    template = ChatTemplate.for_model(INTERNLM2, spm, capability="completion")
    assert template.render("the sea") == "the sea" and template.encode("the sea") == spm.encode("the sea")
    assert template.stop_words == () and not template.takes_tools
    template = ChatTemplate.for_model(LLAMA, smollm2, ChatTemplateConfig(capability="completion"))
    assert template.render("x") == "x"


def test_a_model_without_template_is_said(spm, caplog):
    with caplog.at_level(logging.WARNING):
        template = ChatTemplate.for_model(LLAMA, spm)
    assert "no chat template" in caplog.text
    assert template.render([system("a "), user("b "), assistant("c")]) == "a b c"
    assert template.encode("sea") == spm.encode("sea") != spm.encode("sea", bos=False)
    kind = ChatTemplate.for_model(LLAMA, spm, meta_instruction="Be kind. ")
    assert kind.render("x") == "Be kind. x"


def test_an_unknown_name_is_said(smollm2, caplog):
    with caplog.at_level(logging.WARNING):
        template = ChatTemplate.for_model(LLAMA, smollm2, ChatTemplateConfig("vicuna", stop_words=["###"]))
    assert "'vicuna'" in caplog.text and template.render("x").startswith("<|im_start|>system\nYou are a helpful AI")
    assert template.stop_words == ("<|im_end|>", "###")


# --- the checkpoint's own


def test_named_templates(smollm2):
    own = with_template(smollm2, "plain {{ messages[0].content }}", tool_use="{{ tools[0].function.name }}")
    template = ChatTemplate.for_model(LLAMA, own)
    assert template.takes_tools
    assert template.render("x") == "plain x" and template.render("x", TOOLS) == "add"
    assert template.render("x", []) == "plain x"
    assert ChatTemplate.for_model(LLAMA, with_template(smollm2, rag="only one")).render("x") == "only one"
    with pytest.raises(ValueError, match="the model's chat templates are rag, tool"):
        ChatTemplate.for_model(LLAMA, with_template(smollm2, rag="a", tool="b"))


def test_variables(smollm2):
    own = with_template(smollm2, "{{ bos_token if enable_thinking else eos_token }}")
    template = ChatTemplate.for_model(LLAMA, own)
    assert template.render("x", enable_thinking=True) == "<|im_start|>"
    assert template.render("x", enable_thinking=False) == "<|im_end|>"
    with pytest.raises(ValueError, match="chat_template"):
        template.render("x", chat_template="{{ 1 }}")


def test_a_developer_is_the_system_of_a_template_that_knows_none(smollm2):
    template = ChatTemplate.for_model(LLAMA, smollm2)
    said = [{"role": "developer", "content": "Be short."}, user("hi")]
    assert template.render(said) == template.render([system("Be short."), user("hi")])
    source = "{% for m in messages %}{{ m.role if m.role != 'developer' else 'boss' }} {% endfor %}"
    assert ChatTemplate.for_model(LLAMA, with_template(smollm2, source)).render(said) == "boss user "


def test_the_last_reply_is_continued(smollm2):
    template = ChatTemplate.for_model(LLAMA, smollm2)
    asked = template.render("hi", add_generation_prompt=True)
    assert template.render([user("hi"), assistant("Sure, ")]) == asked + "Sure, "
    assert template.render([user("hi"), assistant("")]) == asked
    closed = template.render([user("hi"), assistant("Sure")], add_generation_prompt=False)
    assert closed == asked + "Sure<|im_end|>\n"
    deaf = ChatTemplate.for_model(LLAMA, with_template(smollm2, "{{ messages[0].content }}"))
    with pytest.raises(ValueError, match="message 1: the chat template leaves out the reply"):
        deaf.render([user("hi"), assistant("Sure")])


def test_tool_calls_are_objects_for_a_template(smollm2):
    own = with_template(smollm2, "{{ messages[1].tool_calls[0].function.arguments | tojson }}{{ tools }}")
    template = ChatTemplate.for_model(LLAMA, own)
    call = {"function": {"name": "add", "arguments": '{"a": "中"}'}}
    assert template.render([user("x"), assistant(None, tool_calls=[call])]) == '{"a": "中"}None'
    with pytest.raises(ValueError, match="message 1: the arguments of add are not JSON"):
        call = {"function": {"name": "add", "arguments": "{"}}
        template.render([user("x"), assistant(None, tool_calls=[call])])
    with pytest.raises(ValueError, match="message 1: the arguments of add are not JSON"):
        call = {"function": {"name": "add", "arguments": "[" * 100_000}}
        template.render([user("x"), assistant(None, tool_calls=[call])])


# --- tools for templates that know none, and for those that are particular

ADDING = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 3}'}}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "3"}
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOLD = (
    "You can call functions. These are their names and arguments, a JSON object for each function:\n<tools>\n"
    + json.dumps(ADD, ensure_ascii=False)
    + """
</tools>

To call a function, reply with a JSON object between tags, and with another one for each further call:
<tool_call>
{"name": "the function's name", "arguments": {"argument": "value"}}
</tool_call>

What a function returns is in the next message, between <tool_response> and </tool_response>."""
)


def test_every_model_is_told_of_tools(smollm2):
    template = ChatTemplate.for_model(LLAMA, smollm2)
    assert not template.takes_tools and template.source
    assert template.render("hi", TOOLS) == (
        f"<|im_start|>system\n{TOLD}<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.render([system("Be kind."), user("hi")], TOOLS).startswith(
        f"<|im_start|>system\nBe kind.\n\n{TOLD}<|im_end|>\n<|im_start|>user\nhi"
    )
    plain = ChatTemplate.for_model(LLAMA, with_template(smollm2, PLAIN), meta_instruction="Be kind.")
    assert plain.render("hi", TOOLS) == f"<system>Be kind.\n\n{TOLD}\n<user>hi\n<assistant>"


def test_calls_and_results_in_a_template_that_knows_none(smollm2):
    template = ChatTemplate.for_model(LLAMA, with_template(smollm2, PLAIN))
    said = [user("x"), assistant("I add.", tool_calls=[ADDING, ADDING]), RESULT, RESULT, user("And?")]
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 3}}\n</tool_call>\n'
    assert template.render(said) == (
        f"<user>x\n<assistant>I add.\n{call}{call}"
        "<user><tool_response>\n3\n</tool_response>\n<tool_response>\n3\n</tool_response>\n<user>And?\n<assistant>"
    )
    silent = template.render([user("x"), assistant(None, tool_calls=[ADDING])])
    assert silent == f"<user>x\n<assistant>{call}<assistant>"
    environment = {"role": "environment", "name": "plugin", "content": "3"}
    assert template.render([user("x"), environment]).endswith("<user><tool_response>\n3\n</tool_response>\n<assistant>")


def test_a_template_without_a_system_message(smollm2):
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + PLAIN
    template = ChatTemplate.for_model(LLAMA, with_template(smollm2, strict))
    assert template.render("hi", TOOLS) == f"<user>{TOLD}\n\nhi\n<assistant>"
    assert template.render([system("Be kind."), user("hi")], TOOLS) == f"<user>Be kind.\n\n{TOLD}\n\nhi\n<assistant>"
    with pytest.raises(ValueError, match="no system message"):
        template.render([system("Be kind."), user("hi")])


def test_results_have_the_role_that_a_template_knows(smollm2):
    knows = "{{ tools }}{% for m in messages %}{% if m.role == 'tool' %}[{{ m.content }}]{% endif %}{% endfor %}"
    template = ChatTemplate.for_model(LLAMA, with_template(smollm2, knows))
    for role in ("tool", "environment", "function"):
        assert template.render([user("x"), {"role": role, "content": "3"}], TOOLS).endswith("[3]")
    both = ChatTemplate.for_model(LLAMA, with_template(smollm2, knows.replace("'tool'", "'environment'")))
    assert both.render([user("x"), {"role": "environment", "content": "3"}], TOOLS).endswith("[3]")


def test_mistral_wants_nine_letters(smollm2):
    ids = (
        "[TOOL_CALLS]{{ tools }}{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].id }} {% endif %}"
        "{% if m.tool_call_id is defined %}{{ m.tool_call_id }}{% endif %}{% endfor %}"
    )
    template = ChatTemplate.for_model(LLAMA, with_template(smollm2, ids))
    made, again = template.render([user("x"), assistant(None, tool_calls=[ADDING]), RESULT]).split("None")[1].split()
    assert made == again and len(made) == 9 and made.isalnum()
    own = [assistant(None, tool_calls=[ADDING | {"id": "abcDEF123"}]), RESULT | {"tool_call_id": "abcDEF123"}]
    assert template.render([user("x"), *own]).endswith("abcDEF123 abcDEF123")


# --- what callers get wrong


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([], "at least one message, not \\[\\]"),
        (None, "not None"),
        ({"role": "user"}, "a list of at least one message"),
        (["hi"], "message 0 is no object"),
        ([user("a"), {"content": "b"}], "message 1 has no role"),
        ([user("a"), {"role": 3, "content": "b"}], "message 1: 3 is no role"),
        ([{"role": "user"}], r"message 0 \(user\) has no content"),
        ([user(None)], r"message 0 \(user\) has no content"),
        ([{"role": "tool", "content": None}], r"message 0 \(tool\) has no content"),
        ([user(5)], r"message 0 \(user\): the content is a text or a list of parts, not 5"),
        ([user([{"type": "image_url", "image_url": {}}])], "message 0: images are not supported"),
        ([user([{"type": "input_audio"}])], "message 0: parts of the type 'input_audio'"),
        ([user([{"type": "text"}])], "message 0: a part of the type text has no text"),
        ([user("a") | {"name": 5}], r"message 0 \(user\): its name is a text, not 5"),
        ([user([5])], "message 0: a part of the content is an object with a type, not 5"),
        ([user("a"), assistant(None, tool_calls=[{"id": "1"}])], "message 1: a tool call has no function"),
        ([user("a"), assistant(None, tool_calls=[{"id": 1, "function": {"name": "f"}}])], "a text as its id"),
        ([user("a"), assistant(None, tool_calls=[{"type": "x", "function": {"name": "f"}}])], "the type .function."),
        ([user("a"), assistant(None, tool_calls=[{"function": {"name": "f", "arguments": 5}}])], "f are no object"),
        ([user("a"), {"role": "judge", "content": "b"}], "message 1: the role 'judge' is none of system"),
    ],
)
def test_messages_that_cannot_be_used(internlm2, messages, reason):
    with pytest.raises(ValueError, match=reason):
        internlm2.render(messages)


def test_parts_of_text(internlm2):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert internlm2.render([user(parts)]) == internlm2.render("a\nb")


@pytest.mark.parametrize("tools", [[3], [{"type": "function"}], [{"type": "function", "function": {}}]])
def test_tools_that_cannot_be_used(internlm2, tools):
    with pytest.raises(ValueError, match="tool 0 is no function with a name"):
        internlm2.render("x", tools)


def test_messages_stay_as_they_are(internlm2):
    messages = [user([{"type": "text", "text": "a"}]), assistant(None, tool_calls=[{"function": dict(name="f")}])]
    before = json.dumps(messages)
    internlm2.render(messages, TOOLS)
    assert json.dumps(messages) == before


def test_half_a_character_is_refused(smollm2):
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        ChatTemplate.for_model(LLAMA, smollm2).encode("a\ud800")
