//! The date for chat templates.

use std::time::{SystemTime, UNIX_EPOCH};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// The current time, in UTC, in a format of `strftime`.
pub(super) fn now(format: &str) -> Result<String, String> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    at(since.map_or(0, |since| since.as_secs()), format)
}

/// A time, in seconds since 1970, in a format of `strftime`; an error names a directive that is not
/// known here.
fn at(seconds: u64, format: &str) -> Result<String, String> {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = date(days);
    let (month_name, weekday) = (MONTHS[month - 1], WEEKDAYS[(days as usize + 4) % 7]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(char) = chars.next() {
        if char != '%' {
            out.push(char);
            continue;
        }
        let directive = chars.next();
        out += &match directive {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('e') => format!("{day:2}"),
            Some('H') => format!("{:02}", second / 3600),
            Some('I') => format!("{:02}", (second / 3600 + 11) % 12 + 1),
            Some('M') => format!("{:02}", second / 60 % 60),
            Some('S') => format!("{:02}", second % 60),
            Some('p') => if second < 43_200 { "AM" } else { "PM" }.to_owned(),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => {
                format!("{:02}:{:02}:{:02}", second / 3600, second / 60 % 60, second % 60)
            }
            Some('Z') => "UTC".to_owned(),
            Some('%') => "%".to_owned(),
            other => return Err(format!("strftime_now does not know %{}", other.unwrap_or(' '))),
        };
    }
    Ok(out)
}

/// Year, month from 1 and day of the month of a day since 1970, in the Gregorian calendar.
fn date(days: u64) -> (u64, usize, u64) {
    let (mut year, mut day) = (1970, days);
    let is_leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    while day >= 365 + u64::from(is_leap(year)) {
        day -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let february = 28 + u64::from(is_leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if day < length {
            break;
        }
        day -= length;
        month += 1;
    }
    (year, month, day + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(at(0, "%A %d %B %Y %T").unwrap(), "Thursday 01 January 1970 00:00:00");
        assert_eq!(at(951_782_400, "%F %a").unwrap(), "2000-02-29 Tue");
        assert_eq!(at(1_735_689_599, "%d %b %y %I:%M %p %%").unwrap(), "31 Dec 24 11:59 PM %");
        assert!(at(0, "%Q").is_err());
        assert!(at(0, "%").is_err());
    }
}
