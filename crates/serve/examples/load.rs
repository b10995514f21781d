//! Load on a running server: so many streams at once for so long, or so many requests.
//!
//! ```text
//! cargo run --release -p mmfree-serve --example load -- ADDRESS [streams=256] [seconds=60] [requests=0]
//!     [tokens=128] [temperature=0] [pid=0]
//! ```
//!
//! With `requests` it ends after so many, else after the time. Prints one JSON object. With the server's
//! `pid` it says how its memory grew. The client is as small as it can be, since it shares the machine: it
//! counts events and does not parse them.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// What all streams count.
#[derive(Default)]
struct Counts {
    begun: AtomicU64,
    done: AtomicU64,
    failed: AtomicU64,
    /// Events with text, within the time.
    events: AtomicU64,
    /// Tokens by the usage counts of requests that ended.
    tokens: AtomicU64,
}

struct Plan {
    address: String,
    until: Instant,
    requests: u64,
    tokens: u64,
    temperature: f64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().ok_or("expected the server's address, as in 127.0.0.1:8080")?;
    let options: HashMap<String, f64> = arguments
        .map(|argument| {
            let (name, value) = argument.split_once('=').ok_or("expected NAME=NUMBER")?;
            Ok((name.to_owned(), value.parse().map_err(|_| "expected NAME=NUMBER")?))
        })
        .collect::<Result<_, &str>>()?;
    let option = |name: &str, default: f64| options.get(name).copied().unwrap_or(default);
    let (streams, seconds) = (option("streams", 256.0) as u64, option("seconds", 60.0));
    let pid = option("pid", 0.0) as u64;
    let begin = Instant::now();
    let plan = Arc::new(Plan {
        address,
        until: begin + Duration::from_secs_f64(seconds),
        requests: option("requests", 0.0) as u64,
        tokens: option("tokens", 128.0) as u64,
        temperature: option("temperature", 0.0),
    });
    let counts = Arc::new(Counts::default());
    let tasks: Vec<_> = (0..streams)
        .map(|number| tokio::spawn(stream(plan.clone(), counts.clone(), number)))
        .collect();
    let (mut memory, mut marks) =
        (Vec::new(), vec![1_000, 10_000, u64::MAX].into_iter().peekable());
    while tasks.iter().any(|task| !task.is_finished()) {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let done = counts.done.load(Ordering::Relaxed);
        if marks.peek().is_some_and(|&mark| done >= mark) {
            memory.push(json!({"requests": done, "resident_kib": resident_kib(pid)}));
            marks.next();
        }
    }
    let elapsed = begin.elapsed().as_secs_f64();
    let mut first = Vec::new();
    let mut gaps = Vec::new();
    for task in tasks {
        let (task_first, task_gaps) = task.await?;
        first.extend(task_first);
        gaps.extend(task_gaps);
    }
    let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let report = json!({
        "streams": streams,
        "seconds": elapsed,
        "requests_done": load(&counts.done),
        "requests_failed": load(&counts.failed),
        "tokens_per_request": plan.tokens,
        "temperature": plan.temperature,
        "tokens_per_second": load(&counts.tokens) as f64 / elapsed,
        "text_events_per_second": load(&counts.events) as f64 / elapsed,
        "first_token_ms": {"p50": percentile(&mut first, 0.5), "p99": percentile(&mut first, 0.99)},
        "gap_ms": {"p50": percentile(&mut gaps, 0.5), "p99": percentile(&mut gaps, 0.99)},
        "memory": memory,
        "resident_kib_at_the_end": resident_kib(pid),
    });
    println!("{report}");
    if load(&counts.failed) > 0 {
        std::process::exit(1);
    }
    Ok(())
}

/// One stream after the other. Returns the times to first tokens and between reads, in milliseconds.
async fn stream(plan: Arc<Plan>, counts: Arc<Counts>, number: u64) -> (Vec<f64>, Vec<f64>) {
    let (mut first, mut gaps) = (Vec::new(), Vec::new());
    let mut connection = None;
    loop {
        let is_over = match plan.requests {
            0 => Instant::now() >= plan.until,
            requests => counts.begun.fetch_add(1, Ordering::Relaxed) >= requests,
        };
        if is_over {
            return (first, gaps);
        }
        match request(&plan, &counts, number, &mut connection, &mut first, &mut gaps).await {
            Ok(()) => {
                counts.done.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => {
                eprintln!("stream {number}: {error}");
                counts.failed.fetch_add(1, Ordering::Relaxed);
                connection = None;
            }
        }
    }
}

async fn request(
    plan: &Plan,
    counts: &Counts,
    number: u64,
    connection: &mut Option<TcpStream>,
    first: &mut Vec<f64>,
    gaps: &mut Vec<f64>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let body = json!({
        "prompt": format!("The traveller of house number {number} opened the door and said"),
        "max_tokens": plan.tokens, "temperature": plan.temperature, "stream": true, "ignore_eos": true,
        "stream_options": {"include_usage": true},
    })
    .to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        plan.address,
        body.len()
    );
    if connection.is_none() {
        *connection = Some(TcpStream::connect(&plan.address).await?);
    }
    let Some(stream) = connection else { return Ok(()) };
    let begin = Instant::now();
    stream.write_all((head + &body).as_bytes()).await?;
    let mut buffer = vec![0; 16 << 10];
    // The last bytes, where markers may be cut.
    let mut tail = Vec::new();
    let mut last: Option<Instant> = None;
    let mut has_head = false;
    loop {
        let length = stream.read(&mut buffer).await?;
        if length == 0 {
            return Err("the connection was closed".into());
        }
        if !has_head && !buffer.starts_with(b"HTTP/1.1 200") {
            return Err(String::from_utf8_lossy(&buffer[..length.min(300)]).into());
        }
        has_head = true;
        tail.extend_from_slice(&buffer[..length]);
        let events = count(&tail, b"\"text\":\"");
        let now = Instant::now();
        if events > 0 {
            counts.events.fetch_add(events, Ordering::Relaxed);
            match last {
                None => first.push((now - begin).as_secs_f64() * 1e3),
                Some(last) => gaps.push((now - last).as_secs_f64() * 1e3),
            }
            last = Some(now);
        }
        if count(&tail, b"\"error\":") > 0 {
            return Err(String::from_utf8_lossy(&tail).into());
        }
        if tail.ends_with(b"0\r\n\r\n") && count(&tail, b"[DONE]") > 0 {
            counts.tokens.fetch_add(plan.tokens, Ordering::Relaxed);
            return Ok(());
        }
        // Whole events have been counted.
        if let Some(end) = tail.windows(2).rposition(|pair| pair == b"\n\n") {
            let keep =
                tail.windows(6).rposition(|word| word == b"[DONE]").map_or(end, |at| at.min(end));
            tail.drain(..keep);
        }
    }
}

fn count(text: &[u8], word: &[u8]) -> u64 {
    text.windows(word.len()).filter(|window| *window == word).count() as u64
}

fn percentile(values: &mut [f64], part: f64) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let at = (values.len() as f64 * part) as usize;
    values.get(at.min(values.len().saturating_sub(1))).copied()
}

/// Resident memory of a process, on Linux.
fn resident_kib(pid: u64) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}
