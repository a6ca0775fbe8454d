use serde_json::{Value, json};

use super::*;

fn golden() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/chat.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn renders_as_transformers_does() {
    let golden = golden();
    let special = golden["special"].as_object().unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() >= 36);
    for case in cases {
        let (template, chat) = (case["template"].as_str().unwrap(), case["chat"].as_str().unwrap());
        let source = golden["templates"][template].as_str().unwrap();
        let messages = golden["chats"][chat].as_array().unwrap();
        let tools = case["tools"].as_bool().unwrap().then(|| golden["tools"].as_array().unwrap().as_slice());
        let rendered = ChatTemplate::new(template, source, special.clone()).unwrap().render(messages, tools, true);
        match case.get("error") {
            Some(error) => {
                let said = rendered.unwrap_err().to_string();
                assert_eq!(said, format!("chat template: {}", error.as_str().unwrap()));
            }
            None => assert_eq!(rendered.unwrap(), case["text"].as_str().unwrap(), "{template} of {chat}"),
        }
    }
}

#[test]
fn a_broken_template_is_refused_with_its_line() {
    let error = ChatTemplate::new("chat_template.jinja", "a\n{% for %}", Map::new()).err().unwrap().to_string();
    assert!(error.starts_with("chat_template.jinja: the chat template cannot be read"), "{error}");
    assert!(error.contains("line 2"), "{error}");
}

#[test]
fn templates_are_found_where_transformers_looks() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    let render = |tools: Option<&[Value]>| {
        let template = ChatTemplate::open(path).unwrap().unwrap();
        template.render(&[], tools, false).unwrap()
    };
    assert!(ChatTemplate::open(path).unwrap().is_none());

    let config = json!({
        "bos_token": {"content": "<s>"},
        "chat_template": [
            {"name": "default", "template": "default {{ bos_token }}"},
            {"name": "tool_use", "template": "tools"},
            {"name": "rag", "template": "{% broken"}
        ]
    });
    std::fs::write(path.join("tokenizer_config.json"), config.to_string()).unwrap();
    assert_eq!(render(None), "default <s>");
    assert_eq!(render(Some(&[])), "tools");

    std::fs::write(path.join("chat_template.json"), json!({"chat_template": "json"}).to_string()).unwrap();
    assert_eq!(render(Some(&[])), "json");
    std::fs::write(path.join("chat_template.jinja"), "jinja {{ bos_token }}").unwrap();
    assert_eq!(render(None), "jinja <s>");
}

#[test]
fn further_variables_reach_the_template() {
    let template = ChatTemplate::new("t", "{{ 'thinks' if enable_thinking else 'does not' }}", Map::new()).unwrap();
    let variables = json!({"enable_thinking": true});
    assert_eq!(template.render(&[], None, true).unwrap(), "does not");
    assert_eq!(template.render_with(&[], None, true, variables.as_object().unwrap()).unwrap(), "thinks");
}

#[test]
fn the_date_can_be_asked_for() {
    let template = ChatTemplate::new("t", "{{ strftime_now('%Y') }}", Map::new()).unwrap();
    let year: u32 = template.render(&[], None, true).unwrap().parse().unwrap();
    assert!((2025..2200).contains(&year));
}

#[test]
fn a_template_without_end_is_stopped() {
    let source = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
    let error = ChatTemplate::new("t", source, Map::new()).unwrap().render(&[], None, true).unwrap_err();
    assert!(error.to_string().contains("fuel"), "{error}");
}
