//! Lesson 4: a conversation as the text that a model was trained on, without a model.
//!
//! ```text
//! cargo run --example 04-chat-template
//! ```

use mmfree::checkpoint::{TokenizerKind, TokenizerSource};
use mmfree::error::Result;
use mmfree::text::chat::{ChatTemplate, Message};

fn main() -> Result<()> {
    // Checkpoints bring a Jinja template; `Checkpoint::tokenizer` finds it.
    let template = ChatTemplate::from_source(&TokenizerSource {
        kind: TokenizerKind::HuggingFace(Vec::new()),
        tokenizer_config: None,
        chat_template: Some(
            "{% for message in messages %}\
             <|{{ message.role }}|>{{ message.content }}<|end|>\
             {% endfor %}\
             {% if add_generation_prompt %}<|assistant|>{% endif %}"
                .into(),
        ),
    })?;
    let conversation = [Message::new("system", "Be brief."), Message::new("user", "Hello!")];
    let text = template.render(&conversation, true)?;
    println!("{text}");
    assert_eq!(text, "<|system|>Be brief.<|end|><|user|>Hello!<|end|><|assistant|>");

    // A recurrent model remembers what it has read, so the next turn is only what is new: the end of
    // its own reply, the user's words, and the request for a reply.
    let text = template.next_turn(Some("Be brief."), "And now?", false)?;
    println!("{text}");
    assert_eq!(text, "<|end|><|user|>And now?<|end|><|assistant|>");

    // A checkpoint without a template is talked to in a plain transcript.
    println!("{}", ChatTemplate::plain().render(&conversation, true)?);
    Ok(())
}

#[test]
fn the_lesson_runs() {
    main().unwrap();
}
